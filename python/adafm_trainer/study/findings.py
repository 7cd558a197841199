"""What each part of a study found: numbers over the seeds, and for the claims that are asserted whether they hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from ..data.packaged import GENERATORS
from . import parts
from .classifier import Classifier, digit_classifier
from .measure import changed, class_shares, metric, metric_name, probabilities, summary
from .plan import Part, Run
from .runner import Runner

SHARE, RELEVANT_P = 0.9, 0.8
SHARES = ("coverage", "nearest_share")


@dataclass
class Row:
    """One quantity of one setting over the seeds; ``numbers`` is ``measure.summary``."""

    label: str
    quantity: str
    numbers: dict


@dataclass
class Finding:
    """The answer to one question. ``holds`` is None for what is only reported."""

    part: str
    claim: str
    asserted: bool
    holds: bool | None
    rows: list[Row]
    notes: list[str] = field(default_factory=list)
    curves: dict[str, list[dict]] = field(default_factory=dict)
    """By label, ``summary`` at each ``step``, for what has a course."""
    course: str = "KID"
    """What the curves show."""

    def to_json(self) -> dict:
        return asdict(self)


def find(part: Part, runner: Runner) -> list[Finding]:
    """The findings of a part whose runs are all done."""
    judge: dict[str, Callable[[Part, Runner], list[Finding]]] = {
        "source": _source,
        "frozen": _frozen,
        "on-manifold": _on_manifold,
        "two-sources": _two_sources,
        "off-manifold": _off_manifold,
        "transfer": _transfer,
        "methods": _methods,
        "outside": _outside,
    }
    return judge[part.name](part, runner)


def _source(part: Part, runner: Runner) -> list[Finding]:
    """The classifier, and what the sources of digits draw."""
    classifier = _classifier(runner)
    rows = [Row("classifier on digits it has not seen", "accuracy", summary([classifier.accuracy], share=True))]
    for run in part.runs:
        if run.name.startswith("source-digits-"):
            shares = class_shares(runner.folder(run), classifier, runner.scale.classified)
            own = sum(shares[digit] for digit in run.images.digits)
            rows.append(Row(f"{run.name}: samples of its own digits", "share", summary([own], share=True)))
            rows.append(
                Row(f"{run.name}: its rarest digit", "share", summary([min(shares[d] for d in run.images.digits)]))
            )
    return [Finding("source", "What the small sources draw", False, None, rows)]


def _frozen(part: Part, runner: Runner) -> list[Finding]:
    """Every run that ends in stage 1, of this part and of the others that are done."""
    everything = [run for each in parts.parts(runner.scale) for run in each.runs]
    mined = [r for r in everything if r.settings.get("stage2") == "none" and runner.done(r) and not runner.diverged(r)]
    found = [(run, changed(runner.folder(run), [runner.source(source) for source in run.sources])) for run in mined]
    rows = [
        Row("generator tensors compared", "count", summary([sum(f["tensors"] for _, f in found)])),
        Row("of these buffers", "count", summary([sum(f["buffers"] for _, f in found)])),
        Row("differing in a bit", "count", summary([sum(len(f["differing"]) for _, f in found)])),
    ]
    notes = [f"{run.name}: {', '.join(f['differing'][:3])}" for run, f in found if f["differing"]]
    notes.append(f"compared after stage 1 of {len(found)} runs, in their weights and their averages")
    claim = "Stage 1 leaves every parameter and buffer of G bit-identical"
    whole = len(found) > 0 and all(f["buffers"] for run, f in found if run.name in ("frozen-dcgan", "frozen-biggan"))
    holds = whole and not any(f["differing"] for _, f in found)
    return [Finding("frozen", claim, True, holds, rows, notes)]


def _on_manifold(part: Part, runner: Runner) -> list[Finding]:
    classifier = _classifier(runner)
    rows, source = [], part.runs[0].sources[0]
    before = class_shares(runner.folder(source), classifier, runner.scale.classified)
    for target in parts.ON_MANIFOLD:
        shares = []
        for run in _of(part, target):
            found = None
            if not runner.diverged(run):
                found = class_shares(runner.folder(run), classifier, runner.scale.classified)
            shares.append(None if found is None else sum(found[digit] for digit in target))
        name = f"digit{'s' if len(target) > 1 else ''} {' and '.join(map(str, target))}"
        rows.append(Row(f"{name}, source", "share", summary([sum(before[digit] for digit in target)])))
        rows.append(Row(f"{name}, mined", "share", summary(shares, share=True)))
    mined = [value for row in rows if row.label.endswith("mined") for value in row.numbers["values"]]
    claim = f"Stage 1 alone puts more than {SHARE:.0%} of the samples into the target's class, with every seed"
    notes = [f"judged by a classifier that names {classifier.accuracy:.1%} of {classifier.tested} unseen digits"]
    return [Finding("on-manifold", claim, True, all(v is not None and v > SHARE for v in mined), rows, notes)]


def _two_sources(part: Part, runner: Runner) -> list[Finding]:
    labels = [_source_label(source) for source in part.runs[0].sources]
    findings = []
    for target, asserted in ((parts.RELEVANT, True), (parts.BOTH_RELEVANT, False)):
        rows, curves = _probabilities(runner, _of(part, target), labels)
        name = " and ".join(map(str, target))
        claim, holds = f"Target {name}, of which each source covers one", None
        if asserted:
            claim = f"Target {name}, which the second source alone covers: its p exceeds {RELEVANT_P} with every seed"
            holds = all(value is not None and value > RELEVANT_P for value in rows[-1].numbers["values"])
        findings.append(Finding("two-sources", claim, asserted, holds, rows, [], curves, "p"))
    return findings


def _off_manifold(part: Part, runner: Runner) -> list[Finding]:
    classifier, rows = _classifier(runner), []
    for name, label in (("stage1", "stage 1 alone"), ("stage2", "both stages")):
        runs = [run for run in part.runs if run.name.startswith(f"off-manifold-{name}-")]
        rows += [Row(label, *_metric(runner, runs, "kid"))]
        shares = [
            None
            if runner.diverged(run)
            else class_shares(runner.folder(run), classifier, runner.scale.classified)[parts.RELEVANT[0]]
            for run in runs
        ]
        rows.append(Row(label, "share classified as the target", summary(shares, share=True)))
    claim = f"Digit {parts.RELEVANT[0]} mined from a source of other digits, equal steps"
    return [Finding("off-manifold", claim, False, None, rows)]


def _transfer(part: Part, runner: Runner) -> list[Finding]:
    of = {w: [run for run in part.runs if run.name.startswith(f"transfer-{w}-")] for w in parts.TRANSFERS}
    rows = [Row(which, *_metric(runner, runs, "kid")) for which, runs in of.items()]
    kids = {row.label: row.numbers["values"] for row in rows}
    pairs = list(zip(kids["both"], kids["none"], strict=True))
    holds = all(None not in pair and pair[0] < pair[1] for pair in pairs)
    order = sorted((row for row in rows if row.numbers["mean"] is not None), key=lambda row: row.numbers["mean"])
    notes = [f"by mean KID, best first: {', '.join(row.label for row in order)}"]
    curves = {which: _curve(runner, runs) for which, runs in of.items()}
    first = Finding(
        "transfer", "Both networks transferred beat neither, with every seed", True, holds, rows, notes, curves
    )
    rows = [
        Row(which, "steps", summary([_reached(runner, *pair) for pair in zip(runs, of["none"], strict=True)]))
        for which, runs in of.items()
    ]
    every = part.runs[0].settings["eval_every"]
    notes = [f"judged every {every} steps; a seed that does not get there is missing"]
    return [first, Finding("transfer", "Steps to the final KID of training from scratch", False, None, rows, notes)]


def _methods(part: Part, runner: Runner) -> list[Finding]:
    findings = []
    for count in runner.scale.targets:
        rows = []
        for method in parts.METHODS:
            runs = [run for run in part.runs if run.name.startswith(f"methods-{method}-{count}-")]
            rows += [Row(method, *_metric(runner, runs, name)) for name in ("kid", "coverage", "nearest_share")]
        claim = f"{count} target images: KID, coverage and share of memorised samples on images withheld"
        findings.append(Finding("methods", claim, False, None, rows))
    return findings


def _outside(part: Part, runner: Runner) -> list[Finding]:
    findings = []
    for target in (*GENERATORS, "mixture"):
        runs = [run for run in part.runs if run.name.startswith(f"outside-{target}-seed")]
        rows, curves = _probabilities(runner, runs, list(GENERATORS))
        what = "a mixture of both" if target == "mixture" else f"samples of {target}"
        claim = f"Two generators trained by others, mined for {what}"
        findings.append(Finding("outside", claim, False, None, rows, [], curves, "p"))
    return findings


def _probabilities(runner: Runner, runs: list[Run], labels: list[str]) -> tuple[list[Row], dict[str, list[dict]]]:
    """p of the sources ``labels`` in the end, and its course."""
    courses = [{} if runner.diverged(run) else probabilities(runner.folder(run)) for run in runs]
    steps = sorted(set().union(*courses))
    curves = {
        label: [{"step": s, **summary([c[s][k] if s in c else None for c in courses], share=True)} for s in steps]
        for k, label in enumerate(labels)
    }
    last = [c[max(c)] if c else None for c in courses]
    rows = [
        Row(label, "p", summary([None if p is None else p[k] for p in last], share=True))
        for k, label in enumerate(labels)
    ]
    return rows, curves


def _classifier(runner: Runner) -> Classifier:
    scale, every = runner.scale, parts.SOURCE_DIGITS["all"]
    training, apart = (runner.images(f(scale, every)) for f in (parts.digits, parts.digits_apart))
    return digit_classifier(training, apart, scale.classifier_steps, runner.root / "classifier")


def _of(part: Part, target: tuple[int, ...]) -> list[Run]:
    return [run for run in part.runs if run.images.digits == target]


def _source_label(source: Run) -> str:
    return f"source of {', '.join(map(str, source.images.digits))}"


def _metric(runner: Runner, runs: list[Run], name: str) -> tuple[str, dict]:
    """Full name of a metric and its last values over runs that differ in their seed."""
    last = [None if runner.diverged(run) else runner.metrics(run)[-1] for run in runs]
    full = next((metric_name(row, name) for row in last if row is not None), name)
    return full, summary([None if row is None else metric(row, name) for row in last], share=name in SHARES)


def _curve(runner: Runner, runs: list[Run]) -> list[dict]:
    """KID over the steps."""
    rows = [{row["step"]: metric(row, "kid") for row in runner.metrics(run)} for run in runs]
    steps = sorted(set().union(*rows))
    return [{"step": step, **summary([row.get(step) for row in rows])} for step in steps]


def _reached(runner: Runner, run: Run, scratch: Run) -> int | None:
    """First judged step at which ``run`` is as good as ``scratch`` in the end; None where it never is."""
    if runner.diverged(run) or runner.diverged(scratch):
        return None
    goal = metric(runner.metrics(scratch)[-1], "kid")
    return next((row["step"] for row in runner.metrics(run) if metric(row, "kid") <= goal), None)
