// The sample browser: search, filters, pages, and one folded item per prompt.

const PAGE = 10;

// Words of a search: quoted phrases, else every word, in lower case.
function searchTerms(query) {
  return [...query.toLowerCase().matchAll(/"([^"]+)"|([^\s"]+)/g)].map((found) => found[1] || found[2]);
}

// Fill a node with text in which the terms are marked. Never interprets the text.
function withMarks(node, text, terms) {
  const lower = text.toLowerCase();
  // Lower case may have another length (as of a dotted capital I): then nothing is marked.
  const found = terms.length && lower.length === text.length ? terms : [];
  let at = 0;
  while (at < text.length) {
    let next = -1;
    let length = 0;
    for (const term of found) {
      const place = lower.indexOf(term, at);
      if (place >= 0 && (next < 0 || place < next || (place === next && term.length > length))) [next, length] = [place, term.length];
    }
    if (next < 0) break;
    node.append(text.slice(at, next), element("mark", {}, text.slice(next, next + length)));
    at = next + length;
  }
  node.append(text.slice(at));
  return node;
}

// Options: {items, filters: [{name, label, options: [[value, text]], keep(item, value, chosen)}], textOf(item),
// summary(item, chosen), detail(item, terms, chosen), keep(item, chosen)}.
function sampleBrowser(host, { items, filters, textOf, summary, detail }) {
  const texts = new Map();
  const chosen = {};
  let page = 0;
  let kept = items;
  const search = element("input", { type: "search", placeholder: "words, or \"a phrase\"", autocomplete: "off", spellcheck: false });
  const bar = element("div", { class: "filters" }, element("label", { class: "wide" }, "Search all texts", search));
  for (const filter of filters) {
    chosen[filter.name] = "";
    const control = filter.options
      ? element("select", {}, ...filter.options.map(([value, text]) => element("option", { value }, text)))
      : element("input", { type: "number", min: "0", step: "1", placeholder: filter.hint || "" });
    control.dataset.filter = filter.name;
    control.addEventListener(filter.options ? "change" : "input", () => {
      chosen[filter.name] = control.value;
      update();
    });
    bar.append(element("label", {}, filter.label, control));
  }
  const count = element("output", {});
  const back = element("button", { type: "button" }, "Previous");
  const forth = element("button", { type: "button" }, "Next");
  const list = element("ol", { class: "items" });
  host.append(bar, element("div", { class: "pager" }, count, back, forth), list);

  const searchable = (item) => {
    if (!texts.has(item)) texts.set(item, textOf(item).join("\n").toLowerCase());
    return texts.get(item);
  };

  function update(to = 0) {
    const terms = searchTerms(search.value);
    kept = items.filter((item) =>
      filters.every((filter) => !chosen[filter.name] || !filter.keep || filter.keep(item, chosen[filter.name], chosen)) &&
      terms.every((term) => searchable(item).includes(term)));
    const pages = Math.max(1, Math.ceil(kept.length / PAGE));
    page = Math.max(0, Math.min(pages - 1, to));
    const here = kept.slice(page * PAGE, (page + 1) * PAGE);
    count.textContent = kept.length
      ? `${page * PAGE + 1} to ${page * PAGE + here.length} of ${kept.length}${kept.length < items.length ? ` (${items.length} in all)` : ""}`
      : `None of ${items.length} match`;
    back.disabled = page === 0;
    forth.disabled = page === pages - 1;
    list.replaceChildren(...here.map((item, index) => row(item, terms, index === 0)));
  }

  function row(item, terms, open) {
    const folded = element("details", { open: false }, element("summary", {}, ...summary(item, chosen)));
    folded.addEventListener("toggle", () => {
      if (folded.open && folded.childElementCount === 1) {
        folded.append(element("div", { class: "body" }, ...detail(item, terms, chosen)));
      }
    });
    folded.open = open;
    return element("li", {}, folded);
  }

  const turn = (by) => {
    const before = page;
    update(page + by);
    if (page !== before) list.querySelector("summary")?.focus({ preventScroll: true });
  };
  back.addEventListener("click", () => turn(-1));
  forth.addEventListener("click", () => turn(1));
  search.addEventListener("input", () => update());
  search.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      search.value = "";
      update();
    } else if (event.key === "Enter" || event.key === "ArrowDown") {
      event.preventDefault();
      list.querySelector("summary")?.focus();
    }
  });
  list.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const rows = [...list.querySelectorAll(":scope > li > details > summary")];
    const at = rows.indexOf(document.activeElement);
    const move = { ArrowDown: 1, j: 1, ArrowUp: -1, k: -1 }[event.key];
    const pages = { ArrowRight: 1, n: 1, ArrowLeft: -1, p: -1 }[event.key];
    if (at < 0 || (move === undefined && pages === undefined)) return;
    event.preventDefault();
    if (pages !== undefined) turn(pages);
    else rows[Math.max(0, Math.min(rows.length - 1, at + move))].focus();
  });
  update();
  return { focusSearch: () => search.focus() };
}

const anyOption = (text) => ["", text];
const distinct = (values) => [...new Set(values.filter((value) => value !== "" && value !== null && value !== undefined))].sort();

function textBlock(text, terms, more = "") {
  return withMarks(element("div", { class: `text ${more}`, dir: "auto" }), text, terms);
}

// The end of a prefix in one line, from the beginning of a word.
function startOf(prefix) {
  const line = prefix.slice(-200).replace(/\s+/g, " ");
  const from = prefix.length > 200 ? line.indexOf(" ") : 0;
  const text = from > 0 && from < 60 ? `\u2026${line.slice(from)}` : line;
  return element("span", { class: "start", dir: "auto" }, text);
}

// Training samples. An item: {id, corpus, document, prefix, entries: [{run, step, candidates, chosen, rejected, skipped}]}.
function trainingBrowser(host, items, runs) {
  const entries = items.flatMap((item) => item.entries);
  const axes = distinct(entries.flatMap((entry) => entry.candidates.flatMap((one) => Object.keys(one.axes))));
  const sources = distinct(entries.flatMap((entry) => entry.candidates.map((one) => one.source)));
  const reasons = distinct(entries.map((entry) => entry.skipped));
  const valueOn = (candidate, axis) => (axis && axis !== "reward" ? candidate.axes[axis] : candidate.value);
  const chosenOf = (entry) => (entry.chosen === null ? null : entry.candidates[entry.chosen] || null);
  // How the best rollout compares with the best other candidate.
  const outcomeOf = (entry, axis) => {
    const best = (rollouts) => Math.max(...entry.candidates.filter((one) => (one.source === "rollout") === rollouts)
      .map((one) => valueOn(one, axis)).filter((value) => typeof value === "number"));
    const [ours, theirs] = [best(true), best(false)];
    if (!Number.isFinite(ours) || !Number.isFinite(theirs)) return "";
    return Math.abs(ours - theirs) < 1e-9 ? "tie" : ours > theirs ? "won" : "lost";
  };
  const some = (item, chosen, test) => item.entries.some((entry) => (!/^\d+$/.test(chosen.run) || entry.run === Number(chosen.run)) && test(entry));
  const filters = [
    { name: "chosen", label: "Chosen", options: [anyOption("any"), ...sources.map((one) => [`source ${one}`, one]), ...(reasons.length ? [["skipped", "none: skipped"]] : []), ...reasons.map((one) => [`reason ${one}`, `skipped: ${one}`])],
      keep: (item, value, chosen) => some(item, chosen, (entry) => value === "skipped" ? entry.skipped !== "" : value.startsWith("reason ") ? entry.skipped === value.slice(7) : chosenOf(entry)?.source === value.slice(7)) },
    { name: "axis", label: "Axis", options: [anyOption("reward"), ...axes.map((one) => [one, one])],
      keep: (item, value, chosen) => some(item, chosen, (entry) => entry.candidates.some((one) => value in one.axes)) },
    { name: "outcome", label: "Best rollout on that axis", options: [anyOption("any"), ["won", "won"], ["lost", "lost"], ["tie", "tie"]],
      keep: (item, value, chosen) => some(item, chosen, (entry) => outcomeOf(entry, chosen.axis) === value) },
    { name: "from", label: "From step", keep: (item, value, chosen) => some(item, chosen, (entry) => entry.step >= Number(value)) },
    { name: "to", label: "To step", keep: (item, value, chosen) => some(item, chosen, (entry) => entry.step <= Number(value)) },
  ];
  const corpora = distinct(items.map((item) => item.corpus));
  if (corpora.length > 1) filters.push({ name: "corpus", label: "Set", options: [anyOption("any"), ...corpora.map((one) => [one, one])], keep: (item, value) => item.corpus === value });
  if (runs.length > 1) {
    filters.unshift({ name: "run", label: "Run", options: [anyOption("any"), ["all", "prompts of all runs"], ...runs.map((run, index) => [String(index), run])],
      keep: (item, value) => value === "all" ? new Set(item.entries.map((entry) => entry.run)).size === runs.length : item.entries.some((entry) => entry.run === Number(value)) });
  }

  // What was chosen in each run; counted if there are many.
  const badges = (entries) => {
    const words = entries.map((entry) => (entry.skipped ? "skipped" : chosenOf(entry)?.source || "none chosen"));
    const counts = new Map(words.map((word) => [word, words.filter((other) => other === word).length]));
    const shown = words.length > 3 ? [...counts].map(([word, count]) => [word, `${word} ${count}`]) : words.map((word) => [word, word]);
    return shown.map(([word, text]) => element("span", { class: `badge ${{ skipped: "bad", rollout: "good" }[word] || ""}` }, text));
  };

  function card(entry, candidate, index, terms, axis) {
    const kind = index === entry.chosen ? "chosen" : index === entry.rejected ? "rejected" : "";
    const made = element("div", { class: `card ${kind}` });
    const head = element("header", {}, element("b", {}, `${index + 1} ${candidate.source}`));
    if (kind) head.append(element("span", { class: `badge ${kind === "chosen" ? "good" : "bad"}` }, kind));
    const value = valueOn(candidate, axis);
    if (typeof value === "number") head.append(element("span", {}, `${axis || "reward"} ${shortNumber(value)}`));
    made.append(head, textBlock(candidate.text, terms));
    const facts = Object.entries(candidate.axes).map(([name, number]) => `${name} ${shortNumber(number)}`);
    if (axis && candidate.value !== null) facts.unshift(`reward ${shortNumber(candidate.value)}`);
    if (candidate.judge) facts.push(candidate.judge);
    if (candidate.version !== null) facts.push(`policy version ${candidate.version}`);
    if (candidate.finish) facts.push(`ended by ${candidate.finish}`);
    if (candidate.failed) made.append(withMarks(element("p", { class: "facts" }, element("b", {}, "No reward: ")), candidate.failed, terms));
    if (facts.length) made.append(element("p", { class: "facts" }, facts.join(" \u00b7 ")));
    if (candidate.votes.length) {
      const open = terms.some((term) => candidate.votes.some((vote) => vote.reply.toLowerCase().includes(term)));
      made.append(element("details", { open }, element("summary", {}, `${candidate.votes.length} vote${candidate.votes.length > 1 ? "s" : ""}`),
        ...candidate.votes.map((vote) => element("div", { class: "vote" }, element("b", {}, `${vote.axis}: ${vote.verdict}`), textBlock(vote.reply, terms)))));
    }
    return made;
  }

  return sampleBrowser(host, {
    items,
    filters,
    textOf: (item) => [item.id, item.document, item.prefix, ...item.entries.flatMap((entry) => [entry.skipped, entry.rewrite,
      ...entry.candidates.flatMap((one) => [one.text, one.failed, ...one.votes.map((vote) => vote.reply)])])],
    summary: (item) => [
      element("span", { class: "where" }, `step ${distinct(item.entries.map((entry) => entry.step)).join(", ")}`),
      startOf(item.prefix),
      element("span", { class: "outcome" }, ...badges(item.entries)),
    ],
    detail: (item, terms, chosen) => [
      element("p", { class: "entry" }, [item.corpus, item.document, `episode ${item.id}`].filter(Boolean).join(" \u00b7 ")),
      textBlock(item.prefix, terms, "prefix"),
      ...item.entries.flatMap((entry) => [
        runs.length > 1 ? element("p", { class: "entry" }, key(entry.run), `${runs[entry.run]}, step ${entry.step}`) : null,
        entry.skipped ? element("p", { class: "entry" }, `Skipped: ${entry.skipped}`) : null,
        entry.rewrite ? element("p", { class: "entry" }, `No rewrite: ${entry.rewrite}`) : null,
        element("div", { class: "cards" }, ...entry.candidates.map((one, index) => card(entry, one, index, terms, chosen.axis))),
      ]).filter(Boolean),
    ],
  });
}

// Examples of evaluations. An item: {set, id, label, prefix, original, entries: [{run, model, reference, decoding, text,
// scores, wins}]}.
function evaluationBrowser(host, items, runs, { in_sample: judges, models, columns }) {
  const entries = items.flatMap((item) => item.entries);
  const columnOf = (entry) => models[`${entry.run}/${entry.model}`] ?? -1;
  const nameOf = (entry) => columns[columnOf(entry)] ?? entry.model;
  const names = [...new Set(entries.map(nameOf))];
  const compared = [...new Set(entries.filter((entry) => Object.keys(entry.wins).length).map(nameOf))];
  const asked = distinct(entries.flatMap((entry) => [...Object.keys(entry.wins), ...Object.keys(entry.scores)]));
  const title = (judge) => (judges[judge] ? `${judge} (in-sample)` : judge);
  const outcome = (share) => (share > 0.5 ? "won" : share < 0.5 ? "lost" : "tie");
  const outcomes = (item, chosen) => item.entries
    .filter((entry) => (!chosen.model || nameOf(entry) === chosen.model) && (!chosen.decoding || entry.decoding === chosen.decoding))
    .flatMap((entry) => Object.entries(entry.wins).filter(([judge]) => !chosen.judge || judge === chosen.judge).map(([, share]) => outcome(share)));
  const choice = (name, label, values, keep) => ({ name, label, options: [anyOption("any"), ...values.map((one) => (Array.isArray(one) ? one : [one, one]))], keep });
  const filters = [
    choice("set", "Set", distinct(items.map((item) => item.set)), (item, value) => item.set === value),
    choice("model", "Model", compared.length ? compared : names, (item, value) => item.entries.some((entry) => nameOf(entry) === value)),
    choice("judge", "Axis (judge)", asked.map((one) => [one, title(one)]), (item, value) => item.entries.some((entry) => value in entry.wins || value in entry.scores)),
    choice("decoding", "Decoding", distinct(entries.map((entry) => entry.decoding)), (item, value) => item.entries.some((entry) => entry.decoding === value)),
    choice("outcome", "Against the reference", ["won", "lost", "tie"], (item, value, chosen) => outcomes(item, chosen).includes(value)),
  ];
  const labels = distinct(items.map((item) => item.label));
  if (labels.length) filters.push(choice("label", "Label", labels, (item, value) => item.label === value));

  function card(entry, terms, chosen) {
    const made = element("div", { class: "card" });
    const head = element("header", {}, element("b", {}, key(columnOf(entry) < 0 ? COLORS - 1 : columnOf(entry)), nameOf(entry)), element("span", {}, entry.decoding));
    if (entry.reference) head.append(element("span", { class: "badge" }, "reference"));
    made.append(head, textBlock(entry.text, terms));
    for (const judge of distinct([...Object.keys(entry.wins), ...Object.keys(entry.scores)])) {
      const share = entry.wins[judge];
      const line = element("p", { class: "facts" }, judge === chosen.judge ? element("b", {}, title(judge)) : title(judge), " ");
      if (share !== undefined) {
        const what = outcome(share);
        line.append(element("span", { class: `badge ${what === "won" ? "good" : what === "lost" ? "bad" : ""}` }, share === 0 || share === 1 || share === 0.5 ? what : `${what}, ${asShare(share)} of votes`));
      }
      if (entry.scores[judge] !== undefined) line.append(` score ${shortNumber(entry.scores[judge])}`);
      made.append(line);
    }
    return made;
  }

  return sampleBrowser(host, {
    items,
    filters,
    textOf: (item) => [item.id, item.set, item.label, item.prefix, item.original, ...item.entries.map((entry) => entry.text)],
    summary: (item, chosen) => {
      const found = outcomes(item, chosen);
      const all = ["won", "tie", "lost"].map((one) => [one, found.filter((other) => other === one).length]).filter(([, count]) => count);
      return [
        element("span", { class: "where" }, [item.set, item.label].filter(Boolean).join(", ")),
        startOf(item.prefix),
        element("span", { class: "outcome" }, ...all.map(([one, count]) => element("span", { class: `badge ${one === "won" ? "good" : one === "lost" ? "bad" : ""}` }, `${one}${found.length > 1 ? ` ${count}` : ""}`))),
      ];
    },
    detail: (item, terms, chosen) => [
      element("p", { class: "entry" }, [item.set, item.label, `prompt ${item.id}`].filter(Boolean).join(" \u00b7 ")),
      textBlock(item.prefix, terms, "prefix"),
      element("div", { class: "cards" },
        ...item.entries.filter((entry) => !chosen.decoding || entry.decoding === chosen.decoding).map((entry) => card(entry, terms, chosen)),
        item.original ? element("div", { class: "card" }, element("header", {}, element("b", {}, "original")), textBlock(item.original, terms)) : null),
    ],
  });
}
