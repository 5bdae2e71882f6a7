"""Judges of texts, set on what readers said: fluent? changed? Nothing here needs torch.

Each is a logistic regression on a handful of plain features, fitted to the half of data/labels that
may be used to set a rule; its weights are kept in data/labels/rules.json. How well they agree with
readers is measured on the other half: `agreement`, `kappa_line`. They see the text and what is
measured on it, never whether a vector was learned.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np

from .. import DATA
from .behaviours import content_words, kind_of_answer, payload, reads_well, works_in_steps
from .fluency import distinct2

LABELS = DATA / "labels" / "texts.json"
RULES = DATA / "labels" / "rules.json"
DECIDING = DATA / "labels" / "deciding.json"
EFFECT = DATA / "labels" / "effect.json"
_ASKED = ("text", "clean", "prompt")
HIGH = 3.69  # nats: the limit of the default model's own surprise, where labels were given
FIRST = 579  # labels; the later ones are of the sweeps that the first rules already judged
FLUENT = ("surprise", "too short to score", "distinct pairs", "letters", "commonest word")
CHANGED = ("distance", "re-used", "kept", "on the question", "another voice", "length")
# in whom a model speaks that has left its own voice: interjections, itself, a speaker's name
_VOICE = re.compile(
    r"\b(?:ah|ahoy|arr+|aw|aye|eh|hey|oh|ai|assistant|i'm sorry|apologi[sz]e|you are a|no,)\b|"
    r": ?\"|^[A-Z]\w*: ",
    re.IGNORECASE,
)


def fluent_features(text, surprise, high) -> list[float]:
    """FLUENT of a text: its surprise as a share of `high`, the 99th percentile of the model's own
    (0 if too short to score, which the next says); the share of distinct pairs of words, of letters
    and spaces among its characters, and of the commonest word among its words."""
    missing = surprise is None or surprise != surprise
    shown = text.strip() or "."
    words = [word.lower().strip(".,!?;:\"'()") for word in text.split()] or [""]
    letters = sum(c.isalpha() or c.isspace() for c in shown) / len(shown)
    most = max(Counter(words).values()) / len(words)
    relative = 0.0 if missing else min(surprise / high, 2.5)
    return [relative, float(missing), distinct2(text), letters, most]


def changed_features(text, clean, prompt, distance) -> list[float]:
    """CHANGED of a text: its distance to the clean answer; the share of its content words that the
    clean answer has, of the clean answer's that it has, and of the prompt's that it has; whether it
    begins in another voice (an interjection, an assistant's apology, a speaker); its words of 20.
    """
    own, usual, asked = map(content_words, (text, clean, prompt))
    return [
        distance,
        len(own & usual) / max(len(own), 1),
        len(own & usual) / max(len(usual), 1),
        len(own & asked) / max(len(asked), 1),
        float(bool(_VOICE.search(text[:90]))),
        min(len(text.split()), 20) / 20,
    ]


@cache
def _rules() -> dict:
    return json.loads(RULES.read_text(encoding="utf-8"))


def _scores(rule, features) -> np.ndarray:
    """Log odds [n] of a rule."""
    about = _rules()[rule]
    weights = np.array([about["weights"][name] for name in about["weights"]])
    return np.array(features, float).reshape(-1, len(weights)) @ weights + about["intercept"]


def is_fluent(texts, surprise, high) -> np.ndarray:
    """Bool [n]: would a reader call the texts fluent? surprise: in nats per token from the 5th on,
    None or NaN where a text is too short; high: that of the model's own texts, 99th percentile. An
    empty text is not fluent."""
    pairs = zip(texts, surprise, strict=True)
    features = [fluent_features(text, number, high) for text, number in pairs]
    return (_scores("fluent", features) > 0) & np.array([bool(t.strip()) for t in texts], bool)


def is_changed(texts, clean, prompt, distance) -> np.ndarray:
    """Bool [n]: would a reader say that the texts do something else than the `clean` answer to the
    `prompt`? distance: 1 − cosine of each text's embedding and the clean answer's, [n]. The clean
    answer itself is not changed."""
    pairs = zip(texts, distance, strict=True)
    features = [changed_features(text, clean, prompt, number) for text, number in pairs]
    return (_scores("changed", features) > 0) & np.array([text != clean for text in texts], bool)


def reasons(row, judged, high) -> list[str]:
    """What speaks most against a text that is not changed, or not fluent: in words, with the
    feature that takes most from the rule's score, compared with a typical good text."""
    found = []
    if not row["text"].strip():
        return ["empty"]
    for rule, names, features in (
        ("fluent", FLUENT, fluent_features(row["text"], judged["surprise"], high)),
        ("changed", CHANGED, changed_features(*(row[k] for k in _ASKED), judged["distance"])),
    ):
        if not judged[rule]:
            about = _rules()[rule]
            weights, usual = about["weights"], about["typical"]
            pull = {n: weights[n] * (x - usual[n]) for n, x in zip(names, features)}
            worst = min(pull, key=pull.get)
            found.append(f"not {rule}: {worst}")
    return found


@dataclass(frozen=True)
class FluentRange:
    """How surprising a model's own texts are to it, in nats per token: their 1st and 99th
    percentile, and how many they were. The second scales the rule for "fluent"."""

    low: float
    high: float
    n: int

    def __call__(self, surprise, texts) -> np.ndarray:
        """`is_fluent` of the texts: bool [n]."""
        return is_fluent(texts, surprise, self.high)


# -- labels: fitting, and agreement ----------------------------------------------------------------
def labels(study: str, half: str | None = None) -> list[dict]:
    """The labelled texts of one study ("03" …), of one half if given; see data/labels."""
    found = json.loads(LABELS.read_text(encoding="utf-8"))
    return [t for t in found if t["study"] == study and half in (None, t["half"])]


def _features(rule, texts):
    rows = []
    for t in texts:
        if rule == "fluent":
            rows.append(fluent_features(t["text"], t["surprise"], HIGH))
        else:
            rows.append(changed_features(t["text"], t["clean"], t["prompt"], t["distance"]))
    return np.array(rows)


def fit() -> dict:
    """The rules, fitted to both readers' labels of the half that is for setting: {rule: {"weights":
    {feature: number}, "intercept", "typical": the mean features of texts that both say have it}}.
    For "changed" a fluent text counts three times: among gibberish, which is changed anyway, there
    is little to learn. "fluent" stays as the FIRST labels set it: the later ones gain it nothing,
    and the R that notebook 04 chose and then measured hangs on it."""
    from sklearn.linear_model import LogisticRegression

    everyday, found = labels("03", "set"), {}
    first = [text for text in everyday if int(text["id"][1:]) < FIRST]
    for rule, names, strength, texts in (
        ("fluent", FLUENT, 10.0, first),
        ("changed", CHANGED, 1.0, everyday),
    ):
        x = _features(rule, texts)
        spread = x.std(0)
        truth = np.array([[reader[rule] for reader in t["readers"]] for t in texts])  # [n, 2]
        fluent = np.array([[reader["fluent"] for reader in t["readers"]] for t in texts])
        weight = np.where(fluent, 3.0, 1.0) if rule == "changed" else np.ones(truth.shape)
        model = LogisticRegression(C=strength, max_iter=2000)
        model.fit(np.tile(x / spread, (2, 1)), truth.T.ravel(), weight.T.ravel())
        weights = dict(zip(names, (model.coef_[0] / spread).round(4).tolist()))
        typical = dict(zip(names, x[truth.all(1)].mean(0).round(4).tolist()))
        found[rule] = {"weights": weights, "intercept": round(float(model.intercept_[0]), 4)}
        found[rule]["typical"] = typical
    return found


def judged_by_rule(study, label, texts) -> np.ndarray:
    """What our rules say of labelled texts, in the readers' words."""
    said = [t["text"] for t in texts]
    if label == "kind":
        fluent = judged_by_rule(study, "fluent", texts)
        prompts = [t["prompt"] for t in texts]
        return np.array(list(map(kind_of_answer, said, prompts, fluent.tolist())))
    if label == "refusal":
        return judged_by_rule(study, "kind", texts) == "refusal"
    if label == "steps":
        return np.array([works_in_steps(text) for text in said])
    if label == "payload":
        return np.array([payload(text) or "none" for text in said])
    if label == "both":
        return judged_by_rule(study, "changed", texts) & judged_by_rule(study, "fluent", texts)
    if label == "fluent" and study == "06":
        return np.array([reads_well(t["text"], t["surprise"]) for t in texts])
    if label == "fluent":
        return is_fluent(said, [t["surprise"] for t in texts], HIGH)
    return _scores(label, _features(label, texts)) > 0


def _read(label, texts, reader) -> np.ndarray:
    given = [t["readers"][reader] for t in texts]
    if label == "both":
        return np.array([row["changed"] and row["fluent"] for row in given])
    if label == "refusal":
        return np.array([row["kind"] == "refusal" for row in given])
    return np.array([row[label] for row in given])


def kappa(a: Iterable, b: Iterable) -> float:
    """Cohen's κ: agreement beyond chance (0 none, 1 full; 1 where both say one thing only)."""
    from sklearn.metrics import cohen_kappa_score

    a, b = np.asarray(a), np.asarray(b)
    return 1.0 if (a == b).all() else float(cohen_kappa_score(a, b))


def agreement(study: str, label: str, half: str = "report") -> dict:
    """How a rule agrees with the readers on the texts of one half that it was not set on.

    label: "fluent", "changed" or "both" (03), "kind" or "refusal" (04), "steps" (05), "payload" or
    "fluent" (06). {"n", "agree": share, with the first reader, "rule": κ with each reader who read
    all of them, "readers": κ of two with each other, on all texts that both read}.
    """
    texts = labels(study, half)
    ours = judged_by_rule(study, label, texts)
    read = [_read(label, texts, r) for r in range(min(len(t["readers"]) for t in texts))]
    both = [t for t in labels(study) if len(t["readers"]) > 1]
    readers = kappa(*(_read(label, both, reader) for reader in (0, 1)))
    return {
        "n": len(texts),
        "agree": float((ours == read[0]).mean()),
        "rule": [kappa(ours, one) for one in read],
        "readers": readers,
    }


def errors(label: str, half: str | None = None) -> list[dict]:
    """A yes-or-no rule of 03 against the first reader, apart for learned and random vectors by R: a
    contrast of the two needs equal errors. Rows of {"kind", "R", "n", "reader": the reader's rate,
    "rule": the rule's, "sensitivity", "specificity"} (None where there is nothing to find)."""
    texts = labels("03", half)
    ours, read = judged_by_rule("03", label, texts), _read(label, texts, 0)
    rows = []
    for kind in ("learned", "random"):
        for name, low, high in (("R ≤ 12", 0, 12), ("R = 16", 13, 23), ("R ≥ 24", 24, 1e9)):
            of = [
                t["source"]["kind"] == kind and low <= t["source"]["radius"] <= high for t in texts
            ]
            a, b = ours[of], read[of]
            row = {"kind": kind, "R": name, "n": len(a), "reader": b.mean(), "rule": a.mean()}
            row["sensitivity"] = a[b].mean() if b.any() else None
            row["specificity"] = 1 - a[~b].mean() if not b.all() else None
            rows.append(row)
    return [row for row in rows if row["n"]]


def kappa_line(study: str, label: str) -> str:
    """One line to stand beside a figure: "the rule for fluent agrees with readers at κ .87 …"."""
    found = agreement(study, label)
    low, high = min(found["rule"]), max(found["rule"])
    ours = f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} and {high:.2f}"
    name = {"both": "changed and fluent", "kind": "kind of answer"}.get(label, label)
    return (
        f"The rule for “{name}” agrees with readers at κ {ours} on {found['n']} texts that it was "
        f"not set on (two readers with each other: {found['readers']:.2f})."
    )


def read_again(rows):
    """The rows (a DataFrame with prompt, text, kind, radius) of the cells that decide notebook 03,
    with `read`: the share of the readers of data/labels/deciding.json, blind to kind and R, who
    call the answer changed and fluent. Answers equal to the unsteered one were not shown, and
    count as not."""
    labelled = json.loads(DECIDING.read_text(encoding="utf-8"))
    said = {(row["prompt"], row["text"]): row["readers"] for row in labelled}
    deciding = rows["radius"].isin([12, 16]) & rows["kind"].isin(["learned", "random"])
    deciding |= (rows["radius"] == 40) & (rows["kind"] == "random")
    rows = rows[deciding & rows["prompt"].isin({prompt for prompt, _ in said})]
    pairs = zip(rows["prompt"], rows["text"])
    return rows.assign(read=[np.mean(said.get(pair, [False])) for pair in pairs])


def shares_as_read(rows, labelled, kinds=("compliance", "deflection", "frame"), draws=2000) -> dict:
    """{set: (share, low, high)} of the rows (a DataFrame: set, and the rule's kind) that readers
    would call one of `kinds`, judging by `labelled` ({"source": {"set", "rule"}, "readers"}), a
    sample stratified by both: what its readers say of a stratum stands for all of it, mistakes of
    the rule included. Interval: texts resampled within strata. Sets without a sample are left out.
    """
    said = {}  # of each stratum: the share of readers who call a text one of the kinds
    for one in labelled:
        share = np.mean([reader["kind"] in kinds for reader in one["readers"]])
        said.setdefault((one["source"]["set"], one["source"]["rule"]), []).append(share)
    generator, found = np.random.default_rng(0), {}
    for name, part in rows.groupby("set"):
        sizes = part["kind"].value_counts()
        strata = [(n / len(part), np.array(said.get((name, k), []))) for k, n in sizes.items()]
        if all(len(shares) for _, shares in strata):
            again = sum(w * generator.choice(s, (draws, len(s))).mean(1) for w, s in strata)
            middle = float(sum(weight * shares.mean() for weight, shares in strata))
            found[name] = (middle, *np.quantile(again, [0.025, 0.975]).tolist())
    return found


def of_effect() -> list[dict]:
    """The texts of notebook 04 at equal effect that were read blind to set and rule."""
    return json.loads(EFFECT.read_text(encoding="utf-8"))
