"""The quickstart's report: the figure, the tables, the samples, and what was found."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tokenformer.language.data_directory import DatasetInfo
from tokenformer.progress import short_number
from tokenformer.quickstart.plan import QuickstartPlan, RunName
from tokenformer.quickstart.results import QuickstartResults
from tokenformer.report.curves import Curve, read_curve
from tokenformer.report.figures import training_figure, validation_figure
from tokenformer.report.page import Section, write_page
from tokenformer.report.tables import Table


def write_report(
    out: Path,
    plan: QuickstartPlan,
    results: QuickstartResults,
    data: DatasetInfo,
    titles: Mapping[RunName, str],
) -> Path:
    """Write ``report.html`` and its figures into ``out``; returns its path."""
    curves = _curves(out, titles)
    figures = {
        "loss-against-compute": validation_figure(curves),
        "loss-against-time": validation_figure(curves, "seconds"),
        "training-loss": training_figure(curves),
    }
    sections = [
        Section(
            "Loss against compute",
            [summary(results)],
            figures=[
                ("Held-out loss against total compute; the grown model goes on where the small one ended.",
                 figures["loss-against-compute"]),
                ("The same against training time on this machine.", figures["loss-against-time"]),
                ("Training loss, a running mean.", figures["training-loss"]),
            ],
        ),
        Section("Results", tables=[results_table(results, titles)]),
        Section("Growth", [_growth_text(plan, results)]),
        Section(
            f"Samples for the prompt {plan.prompt!r}",
            samples=[(titles[model.name], model.sample) for model in results.models],
        ),
        Section("Data", tables=[_data_table(data)]),
        Section("Settings", ["Do it again with other settings: tokenformer quickstart FIELD=VALUE --out DIR"],
                samples=[("plan.yaml", plan.to_yaml())]),
    ]  # fmt: skip
    lead = (
        "A TokenFormer is trained, made larger without losing anything, and trained on; beside it, from scratch and "
        "with the same total compute, a TokenFormer and a Transformer of its size."
    )
    return write_page(out / "report.html", "TokenFormer quickstart", lead, sections, figures)


def results_table(results: QuickstartResults, titles: Mapping[RunName, str]) -> Table:
    """One row for each model."""
    rows = [
        (
            titles[model.name],
            f"{model.parameters:,}",
            short_number(model.tokens),
            short_number(model.flops),
            f"{model.seconds:.0f}",
            f"{model.lr:g}",
            f"{model.bits_per_byte:.4f}",
        )
        for model in results.models
    ]
    columns = ("model", "parameters", "tokens", "FLOPs", "seconds", "learning rate", "held-out bits per byte")
    return Table("", columns, rows)


def summary(results: QuickstartResults) -> str:
    """What was found, in a sentence or two, whoever won."""
    grown, large, transformer = (results.of(name) for name in ("grown", "large", "transformer"))
    ranked = sorted((grown, large, transformer), key=lambda model: model.bits_per_byte)
    names = {
        "grown": "the grown TokenFormer",
        "large": "the TokenFormer from scratch",
        "transformer": "the Transformer from scratch",
    }
    order = ", then ".join(f"{names[model.name]} ({model.bits_per_byte:.3f})" for model in ranked)
    return (
        f"With about {short_number(grown.flops)} FLOPs each, all stages included, lowest held-out bits per byte first: "
        f"{order}. One seed at a very small size: an illustration, not a result."
    )


def _curves(out: Path, titles: Mapping[RunName, str]) -> list[Curve]:
    curves = {name: read_curve(out / name, title) for name, title in titles.items()}
    curves["grown"] = curves["grown"].after(curves["small"])
    return list(curves.values())


def _growth_text(plan: QuickstartPlan, results: QuickstartResults) -> str:
    growth = results.growth
    return (
        f"From {growth.parameters_before:,} to {growth.parameters_after:,} parameters "
        f"({growth.parameters_after / growth.parameters_before:.2f} times), rule '{plan.grow.init}'. Loss on the same "
        f"batch before {growth.loss_before:.7f}, after {growth.loss_after:.7f}; the largest change of any logit is "
        f"{growth.logit_change:.2g} of the logits' standard deviation."
    )


def _data_table(data: DatasetInfo) -> Table:
    rows = [
        (name, f"{split.documents:,}", f"{split.tokens:,}", f"{split.utf8_bytes:,}")
        for name, split in data.splits.items()
    ]
    title = f"{', '.join(data.sources)}, tokenizer {data.tokenizer}, corpus SHA-256 {data.corpus_sha256}"
    return Table(title, ("split", "documents", "tokens", "UTF-8 bytes"), rows)
