"""What was measured, as a table and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from s1engine.bench.peers.turns import BUSY

MIB = 2**20


def table(report: dict[str, Any]) -> str:
    engines = report["engines"]
    width = max([6, *(len(entry["label"]) for entry in engines.values())])
    ours = [name for name in report["ours"] if name in engines]
    ratio_heads = "".join(f" {name + ' is':>17}" for name in ours)
    lines = [f"{'case':<12} {'engine':<{width}} {'tok/s':>8} {'of floor':>9}{ratio_heads} {'lowest-highest':>17}"]
    for row in report["rows"]:
        ratios = "".join(f" {row['ratios'][name]:>15.2f} x" if name in row["ratios"] else " " * 18 for name in ours)
        spread = f"{row['lowest']:.1f}-{row['highest']:.1f}"
        lines.append(
            f"{row['case']:<12} {engines[row['engine']]['label']:<{width}} {row['tokens_per_second']:>8.1f} "
            f"{row['share_of_floor']:>8.0%} {ratios} {spread:>17}"
        )
    lines += _summary(report, ours)
    lines += [
        "",
        f"{'engine':<{width}} {'anonymous':>10} {'(import)':>9} {'file':>7} {'peak':>7} {'load':>8} {'tokens':>7}",
    ]
    for entry in engines.values():
        memory = entry["memory"]
        sizes = [memory[name] / MIB for name in ("anonymous", "imported", "file_mapped", "peak")]
        lines.append(
            f"{entry['label']:<{width}} {sizes[0]:>10.0f} {sizes[1]:>9.0f} {sizes[2]:>7.0f} {sizes[3]:>7.0f} "
            f"{entry['load_seconds']:>6.1f} s {entry['agreement'] or '-':>7}"
        )
    return "\n".join([*lines, "", *_legend(report), *report["notes"]])


def _summary(report: dict[str, Any], ours: list[str]) -> list[str]:
    """Each of ours against the fastest of the others with weights of its size."""
    lines = []
    for name in ours:
        int8 = report["engines"][name]["int8"]
        parts = []
        for case in report["cases"]:
            against = [
                (row["ratios"][name], report["engines"][row["engine"]]["label"])
                for row in report["rows"]
                if row["case"] == case["name"]
                and row["engine"] not in report["ours"]
                and report["engines"][row["engine"]]["int8"] == int8
                and name in row["ratios"]
            ]
            if against:
                ratio, label = min(against)
                parts.append(f"{case['name']}: {ratio:.2f} x {label}")
        if parts:
            lines.append(f"{name} against the fastest of its weights' size: {'; '.join(parts)}")
    return lines


def _legend(report: dict[str, Any]) -> list[str]:
    bandwidths = sorted(turn["read_bytes_per_second"] / 1e9 for case in report["cases"] for turn in case["turns"])
    calls = [call for case in report["cases"] for turn in case["turns"] for call in turn["engines"].values()]
    beside = [max(call["busy_before"], call["busy_beside"]) for call in calls]
    disturbed = [cores for cores in beside if cores > BUSY]
    args = report["args"]
    range_read = f" ({bandwidths[0]:.1f}-{bandwidths[-1]:.1f} GB/s)" if bandwidths else ""
    lines = [
        f"tok/s: medians of turns. batch N: N x {args['new_tokens'] - 1} / (time of {args['new_tokens']} new tokens - "
        "time of 1); prefill: prompt tokens / time of 1",
        f"floor: bf16 weights and KV cache, for all engines; read at the bandwidth of the same turn{range_read},",
        f"  operations at {report['operations_per_second'] / 1e9:.0f} GFLOP/s (a bf16 matrix product, measured once)",
        "memory: MiB at most, anonymous (after the import alone in brackets) and file-mapped; load: without the import",
        f"tokens: those equal to transformers' before the first that is not, {report['agreement_prompts']} prompts x "
        f"{report['agreement_tokens']}",
    ]
    if disturbed:
        lines.append(
            f"DISTURBED: {len(disturbed)} of {len(calls)} timings had over {BUSY} cores busy with other work before or "
            f"beside them, {max(disturbed):.1f} at most"
        )
    return lines


def plot(report: dict[str, Any], path: Path) -> None:
    """Bars of tokens a second, a group a case, with the floor as a line. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = [case for case in report["cases"] if case["turns"]]
    names = list(report["engines"])
    colours = {name: pyplot.get_cmap("tab10")(i % 10) for i, name in enumerate(names)}
    figure, axes = pyplot.subplots(1, len(cases), figsize=(2 + 2.6 * len(cases), 4.5), squeeze=False)
    for axis, case in zip(axes[0], cases, strict=True):
        its = {row["engine"]: row for row in report["rows"] if row["case"] == case["name"]}
        for place, name in enumerate(name for name in names if name in its):
            rate = its[name]["tokens_per_second"]
            axis.bar(place, rate, color=colours[name], hatch="//" if report["engines"][name]["int8"] else None)
            axis.annotate(f"{rate:.0f}", (place, rate), ha="center", va="bottom", fontsize=7)
        axis.axhline(case["floor"], color="black", linestyle="--", linewidth=1)
        axis.set_title(case["name"])
        axis.set_xticks([])
    axes[0][0].set_ylabel("tokens a second")
    handles: list[Any] = [
        pyplot.Rectangle((0, 0), 1, 1, color=colours[name], hatch="//" if entry["int8"] else None, label=entry["label"])
        for name, entry in report["engines"].items()
    ]
    handles.append(pyplot.Line2D([], [], color="black", linestyle="--", linewidth=1, label="floor, bf16"))
    figure.legend(handles=handles, loc="lower center", ncols=3, fontsize=8)
    shape, threads = report["args"]["shape"], report["args"]["threads"]
    figure.suptitle(f"{shape}, random weights, {threads} threads, {report['machine']['processor']}", fontsize=9)
    figure.tight_layout(rect=(0, 0.16, 1, 1))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
