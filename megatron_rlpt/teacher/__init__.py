"""The teacher: a post-trained model that judges candidates and rewrites suffixes.

The files, in the order in which a judge's reply becomes a candidate's reward:

    generative.py            GenerativeJudge: one request per vote; collects votes, axis values and rewards of a group
    comparisons.py           which pairs of candidates are compared: round robin, pivot or tournament
    prompts/                 prompt texts with versions; fences untrusted text
    generator.py             Request -> Reply; the TextGenerator and Ask protocols
    vllm_generator.py        TextGenerator on vLLM's offline engine (judge_workers/client is the HTTP one)
    thinking.py              strips the model's thoughts from a reply
    verdicts/                Reply -> verdict (``parse_quality`` and so on), or ``Failed``
    bradley_terry.py         strengths from incomplete comparisons
    votes.py                 verdicts -> axis value per candidate (``tally_votes``, ``mean_axis_value``);
                             axis values and weights -> reward (``weighted_reward``)
    frozen_model.py          log-likelihoods of continuations under a frozen model in this process
    likelihood.py            LikelihoodJudge: the log-likelihood of a candidate becomes its reward, no prompt
    served_likelihood.py     the same with log-probabilities from teacher servers
    likelihood_reward.py     log-likelihood and repetition -> reward
    extension_judges.py      judges and rewards from a user's class
    judge.py                 the Judge and GroupJudge protocols; failure rates of judged groups
    judge_metrics.py         judged groups -> ``judge/...`` metrics

Around it:

    rewriter.py              Episode -> rewritten candidate
    batched.py               runs judge and rewriter on a batch generator inside the trainer
    distributed.py           shares groups and episodes among leader ranks
    concurrency.py           ``gather_or_cancel``
    judges.py                registry of judges: how each is built for trainer, servers and workers
    build.py                 builds the teacher from the configuration
    settings_fingerprint.py  makes trainer and judge workers agree on the settings that verdicts depend on
"""
