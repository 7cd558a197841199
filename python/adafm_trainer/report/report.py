"""report.html: one file, no links, that shows what a run did and how good it is."""

from __future__ import annotations

import base64
import json
from html import escape
from importlib import resources
from pathlib import Path

from .charts import Series, interval_chart, line_chart
from .pictures import evolution
from .read import RunRecord, read_run

_COLUMNS = ("kid", "diversity", "coverage", "precision", "nearest_share")
_EXPLAINED = {
    "kid": "kernel inception distance, unbiased; 0 is equal, lower is better",
    "coverage": "share of real images with a sample nearby; higher is better",
    "precision": "share of samples near a real image",
    "diversity": "mean distance between samples in feature space",
    "nearest_share": "share of samples closer to a training image than 95 % of those are to their nearest",
}


def write_report(run_dir: str | Path) -> Path:
    """Write ``report.html`` into a run directory from what lies there, and return its path.

    Parts that the run has not (yet) written are left out with a sentence.

    Raises:
        DataError: a file of the run cannot be understood.
    """
    record = read_run(Path(run_dir))
    sections = (_head, _pictures, _comparison, _evolution, _curves, _memorisation, _blocks, _settings)
    body = "\n".join(section(record) for section in sections)
    style = resources.files("adafm_trainer.report").joinpath("style.css").read_text(encoding="utf-8")
    title = escape(f"{record.config.get('method', 'run')}: {record.root.name}")
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>\n{style}</style></head>\n'
        f"<body>\n{body}\n</body></html>\n"
    )
    path = record.root / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _head(record: RunRecord) -> str:
    config = record.config
    steps = record.stats[-1]["step"] if record.stats else 0
    method, target = config.get("method", "unknown method"), Path(str(config.get("data", "unknown data"))).name
    parts = [f"<h1>{escape(method)} on {escape(target)}</h1>"]
    device = record.environment.get("cpu") or record.environment.get("device", "unknown device")
    parts.append(
        f'<p class="dim">{steps:,} of {config.get("steps", steps):,} steps, batch {config.get("batch", "?")}, '
        f"seed {config.get('seed', '?')}, {escape(str(record.environment.get('compute', '')))}, "
        f"{escape(str(device))}</p>"
    )
    if verdict := _verdict(record):
        parts.append(f'<p class="verdict">{verdict}</p>')
    for row in record.warnings:
        parts.append(f'<p class="warning">step {row["step"]}: {escape(row["message"])}</p>')
    parts += [f'<p class="warning">{escape(note)}</p>' for note in record.notes]
    return "\n".join(parts)


def _verdict(record: RunRecord) -> str:
    found = _named(record.metrics[-1]["metrics"], "kid") if record.metrics else None
    if found is None:
        return "Not evaluated."
    name, entry = found
    text = f"<b>KID {entry['value']:.3f}</b>{_interval(entry)}"
    source = next((row for row in record.comparison if row["steps"] == 0), None)
    before = source and source["metrics"].get(name)
    if before and before["value"] > 0:
        share = entry["value"] / before["value"]
        text += f", {share:.0%} of the unadapted source\u2019s {before['value']:.3f}{_interval(before)}"
    split = "images withheld from training" if name.endswith("heldout") else "the training images themselves"
    return f"{text}, measured against {split} <span class='dim'>({escape(name)})</span>."


def _pictures(record: RunRecord) -> str:
    grids = _grids(record)
    reals = record.root / "reals.png"
    if not grids:
        return "<h2>Samples</h2><p>No samples were written yet.</p>"
    real = f"<figure><figcaption>Training images</figcaption>{_image(reals)}</figure>" if reals.is_file() else ""
    return (
        "<h2>Samples</h2>"
        f'<div class="pair"><figure><figcaption>Generated, step {_step(grids[-1]):,}</figcaption>{_image(grids[-1])}'
        f"</figure>{real}</div>"
    )


def _comparison(record: RunRecord) -> str:
    if not record.comparison:
        return ""
    first = record.comparison[0]["metrics"]
    names = [name for prefix in _COLUMNS if (name := _full_name(first, prefix))]
    kid = _full_name(first, "kid")
    own = next((row for row in record.comparison if row["steps"] > 0), None)
    rows, unlike = [], False
    for row in record.comparison:
        state = "this" if row is own else ""
        mark = "" if not row["committed"] else " *"
        cells = []
        for name in names:
            entry = row["metrics"].get(name)
            unlike = unlike or entry is None
            cells.append(f"<td>{_cell(entry)}</td>")
        rows.append(
            f"<tr class='{state}'><td>{escape(row['label'])}{mark}</td><td>{row['steps']:,}</td>"
            f"{''.join(cells)}<td class='text'>{escape(row.get('note', ''))}</td></tr>"
        )
    header = "".join(f'<th title="{escape(_EXPLAINED[_prefix(n)])}">{escape(_prefix(n))}</th>' for n in names)
    chart = ""
    if kid:
        entries = [(row["label"], row["metrics"].get(kid)) for row in record.comparison]
        values = [(label, e["value"], e["low"], e["high"]) for label, e in entries if e is not None]
        chart = interval_chart("KID, lower is better", values, f"{kid}, with 95 % interval")
    notes = []
    committed = sorted({(row["device"], row["steps"]) for row in record.comparison if row["committed"]})
    if committed:
        where = "; ".join(f"{escape(str(device))}, {steps:,} steps" for device, steps in committed)
        notes.append(
            f"* committed result of the demo\u2019s settings, measured on: {where}. "
            "`adafm demo --compare` makes it again here."
        )
    if unlike:
        notes.append(
            "A dash stands where a row was measured with another feature network or count: such numbers are not "
            "comparable."
        )
    tail = "".join(f'<p class="dim">{note}</p>' for note in notes)
    return (
        f"<h2>Beside what it must be compared with</h2>{chart}"
        f"<div class='scroll'><table><tr><th>run</th><th>steps</th>{header}<th class='text'>what</th></tr>"
        f"{''.join(rows)}</table></div>"
        f"{_legend(names)}{tail}"
    )


def _evolution(record: RunRecord) -> str:
    grids = evolution(_grids(record))
    if len(grids) < 2:
        return ""
    figures = "".join(f"<figure><figcaption>step {_step(g):,}</figcaption>{_image(g)}</figure>" for g in grids)
    return (
        "<h2>How the samples changed</h2><p class='dim'>The same 64 latents throughout, from the weight average.</p>"
        f"<div class='strip'>{figures}</div>"
    )


def _curves(record: RunRecord) -> str:
    def series(key: str, label: str) -> Series:
        return Series(label, [(row["step"], row[key]) for row in record.stats if row.get(key) is not None])

    kid_rows = [(row["step"], found[1]) for row in record.metrics if (found := _named(row["metrics"], "kid"))]
    kid = Series(
        "KID",
        [(step, entry["value"]) for step, entry in kid_rows],
        [(entry["low"], entry["high"]) for _, entry in kid_rows],
    )
    charts = [
        line_chart("Losses", [series("d_loss", "discriminator"), series("g_loss", "generator")], "step", "loss"),
        line_chart("Logits", [series("d_real", "D(real)"), series("d_fake", "D(fake)")], "step", "mean logit"),
        line_chart("R1 penalty", [series("r1", "squared gradient norm, unweighted")], "step", "mean |grad|\u00b2"),
        line_chart("WGAN-GP penalty", [series("gp", "unweighted")], "step", "mean (|grad| \u2212 1)\u00b2"),
        line_chart("Auxiliary classifier", [series("class_loss", "real images")], "step", "cross entropy"),
        line_chart(
            "Sources",
            [
                Series(f"source {k + 1}", [(row["step"], row["p"][k]) for row in record.stats if "p" in row])
                for k in range(max((len(row.get("p", ())) for row in record.stats), default=0))
            ],
            "step",
            "p",
        ),
        line_chart(
            "Augmentation",
            [series("aug_p", "probability"), series("aug_r", "mean sign of D on reals")],
            "step",
            "",
        ),
        line_chart(
            "Distance from identity",
            [series("gamma_distance", "gamma"), series("beta_distance", "beta")],
            "step",
            "rms",
        ),
        line_chart(
            "Watch for collapse",
            [
                series("diversity", "diversity (1: as varied as the training images)"),
                series("nearest_share", "largest share nearest to one training image"),
                series("pixel_std", "pixel deviation"),
            ],
            "step",
            "",
        ),
    ]
    if len(kid_rows) > 1:
        charts.insert(0, line_chart("KID with 95 % interval", [kid], "step", "KID"))
    drawn = "".join(chart for chart in charts if chart)
    return f"<h2>Training</h2><div class='charts'>{drawn or '<p>No statistics were written yet.</p>'}</div>"


def _memorisation(record: RunRecord) -> str:
    picture = record.root / "nearest.png"
    if not picture.is_file():
        return ""
    text = (
        "Each generated image stands over the training image nearest to it in feature space, closest pair first. "
        "Pairs that look the same would mean that training images were copied."
    )
    found = _named(record.metrics[-1]["metrics"], "nearest_share") if record.metrics else None
    if found is not None:
        name, entry = found
        share = f"{entry['value']:.1%}"
        text += f" {share} of the samples are nearer to a training image than 95 % of those are to their nearest"
        text += f" ({escape(entry['note'])}; {escape(name)})." if entry.get("note") else f" ({escape(name)})."
    return f"<h2>Is it copying?</h2><p>{text}</p>{_image(picture)}"


def _blocks(record: RunRecord) -> str:
    if not record.blocks:
        return ""
    rows = []
    for network in dict.fromkeys(row["network"] for row in record.blocks):
        own = [row for row in record.blocks if row["network"] == network]
        for row in own:
            rows.append(
                f"<tr><td>{network} {row.get('number', '')} {escape(row['group'])}</td>"
                f"<td class='text'><span class='state {escape(row['state'])}'>{escape(row['state'])}</span></td>"
                f"<td>{row['parameters']:,}</td><td>{row['trainable']:,}</td></tr>"
            )
        total, trainable = (sum(row[key] for row in own) for key in ("parameters", "trainable"))
        rows.append(f"<tr class='this'><td>{network} total</td><td></td><td>{total:,}</td><td>{trainable:,}</td></tr>")
    return (
        "<h2>What was trained</h2><p class='dim'>Groups are counted from the image side. An adapter group is frozen "
        "but for its gamma and beta.</p><div class='scroll'><table>"
        "<tr><th>group</th><th class='text'>state</th><th>parameters</th><th>trainable</th></tr>"
        f"{''.join(rows)}</table></div>"
    )


def _settings(record: RunRecord) -> str:
    training = record.manifest.get("training") or {}
    evaluation = record.manifest.get("evaluation") or {}
    data = f"{training.get('count', '?')} training images"
    data += f", {evaluation['count']} held-out images" if evaluation else ", no held-out images"
    rejects = len(training.get("rejects", [])) + len(evaluation.get("rejects", []))
    data += f", {rejects} files left out" if rejects else ""
    config = "\n".join(f"{key}: {json.dumps(value)}" for key, value in record.config.items())
    environment = json.dumps(record.environment, indent=1)
    return (
        f"<h2>Settings</h2><p>{data}.</p><details><summary>config.yaml</summary><pre>{escape(config)}</pre></details>"
        f"<details><summary>environment.json</summary><pre>{escape(environment)}</pre></details>"
    )


def _legend(names: list[str]) -> str:
    items = "; ".join(f"<b>{escape(_prefix(n))}</b> {escape(_EXPLAINED[_prefix(n)])}" for n in names)
    protocol = ", ".join(names[:1])
    where = "Extractor, number of samples and split are in the metric\u2019s name"
    return f"<p class='dim'>{items}. {where}: {escape(protocol)}.</p>"


def _grids(record: RunRecord) -> list[Path]:
    return sorted((record.root / "samples").glob("step*.png"))


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step"))


def _image(path: Path) -> str:
    encoded = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(path.name)}" src="data:image/png;base64,{encoded}">'


def _prefix(name: str) -> str:
    return name.partition("[")[0]


def _full_name(metrics: dict, prefix: str) -> str | None:
    return next((name for name in metrics if _prefix(name) == prefix), None)


def _named(metrics: dict, prefix: str) -> tuple[str, dict] | None:
    name = _full_name(metrics, prefix)
    return None if name is None else (name, metrics[name])


def _cell(entry: dict | None) -> str:
    return "\u2013" if entry is None else f"{entry['value']:.3f}{_interval(entry)}"


def _interval(entry: dict) -> str:
    if entry.get("low") is None:
        return ""
    return f" <span class='dim'>[{entry['low']:.3f}, {entry['high']:.3f}]</span>"
