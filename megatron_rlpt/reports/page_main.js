// Start the plots and the sample browsers of a report.

function startReport() {
  const data = JSON.parse(document.getElementById("report-data").textContent);
  const runs = data.runs.map((run) => run.name);

  const seriesOf = (metrics, labels) => data.runs.flatMap((run, index) => metrics.flatMap((metric, place) =>
    run.curves[metric] ? [{ name: runs.length > 1 ? run.name : labels[place], color: runs.length > 1 ? index : place, curve: run.curves[metric] }] : []));

  document.querySelectorAll("[data-chart]").forEach((host) => {
    const chart = data.charts[Number(host.dataset.chart)];
    lineChart(host, chart.title, seriesOf(chart.metrics, chart.labels), { ...chart, named: runs.length > 1 });
  });
  document.querySelectorAll("[data-whiskers]").forEach((host) => {
    const plot = data.whiskers[Number(host.dataset.whiskers)];
    whiskers(host, plot.title, plot.rows, plot.middle);
  });
  document.querySelectorAll("[data-stages]").forEach((host) => stageBars(host, data.stages, runs));

  const picker = document.getElementById("any-metric");
  if (picker) {
    const names = [...new Set(data.runs.flatMap((run) => Object.keys(run.curves)))].sort();
    picker.append(element("option", { value: "" }, "choose"), ...names.map((name) => element("option", { value: name }, name)));
    picker.addEventListener("change", () => {
      const place = document.getElementById("any-plot");
      place.replaceChildren();
      if (!picker.value) return;
      const host = element("div", { class: "plot" });
      place.append(host);
      lineChart(host, picker.value, seriesOf([picker.value], [picker.value]), { named: runs.length > 1 });
    });
  }

  startBrowsers(data, runs);
}

function startBrowsers(data, runs) {
  const section = document.getElementById("samples");
  if (!section) return;
  const parts = [
    ["Evaluation examples", data.evaluation, (host) => evaluationBrowser(host, data.evaluation, runs, data)],
    ["Training samples", data.training, (host) => trainingBrowser(host, data.training, runs)],
  ].filter(([, items]) => items.length);
  const tabs = element("div", { class: "tabs", role: "tablist" });
  const browsers = [];
  let current = 0;
  const show = (index) => {
    current = index;
    browsers.forEach(({ host, tab }, other) => {
      host.hidden = other !== index;
      tab.setAttribute("aria-selected", String(other === index));
      tab.tabIndex = other === index ? 0 : -1;
    });
  };
  parts.forEach(([title, items, start], index) => {
    const host = element("div", { role: "tabpanel" });
    host.setAttribute("aria-label", title);
    const tab = element("button", { type: "button", class: "tab", role: "tab" }, `${title} (${items.length})`);
    tab.addEventListener("click", () => show(index));
    tab.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (move === undefined) return;
      const next = (index + move + parts.length) % parts.length;
      show(next);
      browsers[next].tab.focus();
    });
    tabs.append(tab);
    section.append(host);
    browsers.push({ host, tab, browser: start(host) });
  });
  if (parts.length > 1) browsers[0].host.before(tabs);
  show(0);
  document.addEventListener("keydown", (event) => {
    const typing = event.target instanceof Element && event.target.closest("input, select, textarea");
    if (event.key !== "/" || typing || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    browsers[current].browser.focusSearch();
  });
}

startReport();
