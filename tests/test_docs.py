"""What the README claims has a command that works and rows that were measured."""

import json
import re
from pathlib import Path
from typing import Any

import architecture_sweep
import architecture_tables
import claim_tables
import claims
import generate
import language
import plots
import pytest
import quality
import rivals
import smollm_kept
import smollm_late
import torch
from torch import nn

import randes
from randes.cli import app
from randes.inspect.choose import BY_TABLES, predicted

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = ROOT / "docs"
RESULTS, SPEED, TUNING, COMMANDS = (
    (DOCS / f"{page}.md").read_text(encoding="utf-8") for page in ("results", "speed", "tuning", "command-line")
)
DEFAULT, COLUMNS = "randes, two-sided signs (default)", "randes, column signs"
FULL = "full fine-tunes"
AUTO = "shared basis of rank auto"


KERNEL_ROWS = json.loads((ROOT / "bench" / "results" / "cpu" / "kernels.json").read_text(encoding="utf-8"))["rows"]

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def rows() -> Rows:
    """The committed measurements of quality."""
    found: Rows = json.loads(quality.RESULTS.read_text(encoding="utf-8"))["rows"]
    return found


def table_in(page: str, name: str) -> str:
    """What stands between the marks of a table that a bench prints."""
    found = re.search(rf"<!-- {name}: .*? -->\n(.*?)\n<!-- /{name} -->", page, re.DOTALL)
    assert found is not None, name
    return found[1]


def normalised(rows: Rows, method: str, models: int, group_size: int, setting: str = FULL) -> float:
    """Mean over seeds, in %."""
    chosen = [
        100 * row["mean_normalised"]
        for row in rows
        if (row["method"], row["models"], row["group_size"], row["setting"]) == (method, models, group_size, setting)
    ]
    assert len(chosen) == 3
    return sum(chosen) / 3


def test_the_digits_table_is_that_of_the_rows(rows: Rows) -> None:
    shown = table_in(RESULTS, "quality")
    assert shown.strip() == quality.table(rows)


def test_the_measured_quality_reaches_its_goals(rows: Rows) -> None:
    assert normalised(rows, DEFAULT, 8, 8) >= 99.0
    assert normalised(rows, DEFAULT, 16, 8) >= 99.0
    assert normalised(rows, DEFAULT, 16, 16) >= 98.0
    for setting in quality.SETTINGS:
        for models, group_size in quality.GROUPINGS:
            default = normalised(rows, DEFAULT, models, group_size, setting)
            for method in {row["method"] for row in rows if row["method"].startswith("randes")} - {DEFAULT}:
                assert default > normalised(rows, method, models, group_size, setting)


def test_the_first_screen_says_what_was_measured() -> None:
    readme = " ".join(README.split())
    (row,) = (
        row for row in language.read(smollm_kept.RESULTS)
        if (row["models"], row["group"], row["rank"], row["bits"], row["embeddings"]) == (8, 8, "auto", 2, 0.5)
    )  # fmt: skip
    kept = [100 * share for share in row["kept"]]
    assert f"a store of {row['times']:.2f} times one model keeps {sum(kept) / len(kept):.1f} %" in readme
    assert f"{min(kept):.1f} % in the worst case" in readme

    def ratios(*sizes: int) -> list[float]:
        own = (row for row in KERNEL_ROWS if row["op"] == plots.OP and plots.is_default(row) and row["m"] in sizes)
        return [row["ratio_to_linear"] for row in own]

    few, many = ratios(1, 8), ratios(512)
    assert f"takes {min(few):.1f} to {max(few):.1f} times a plain layer's time" in readme
    assert f"{min(many):.1f} to {max(many):.1f} times ([speed]" in readme
    assert all("cuda" not in str(row["device"]).lower() for row in KERNEL_ROWS)
    assert "**No GPU has been measured.**" in readme


def test_the_table_of_generated_tokens_is_that_of_the_rows() -> None:
    rows = json.loads(generate.FILE.read_text(encoding="utf-8"))["rows"]
    assert table_in(SPEED, "generate").strip() == generate.table(rows)
    seconds = {(row["dtype"], row["way"]): row["seconds"] for row in rows}
    fp32, bf16 = (f"{seconds[kind, generate.MIXED] / seconds[kind, generate.BASE]:.1f}" for kind in ("fp32", "bf16"))
    assert f"in {fp32} times its base's time in fp32 and {bf16} times in bf16" in " ".join(README.split())


def test_every_command_is_shown_and_every_one_shown_exists() -> None:
    shown = set(re.findall(r"^    randes ([\w-]+)", COMMANDS, re.MULTILINE))
    commands = app.registered_commands
    names = {command.name or command.callback.__name__ for command in commands if command.callback}
    assert shown == {name.replace("_", "-") for name in names}


def test_the_tables_of_the_small_language_model_are_those_of_the_rows() -> None:
    text = RESULTS
    rows = json.loads(language.RESULTS.read_text(encoding="utf-8"))["rows"]
    assert table_in(text, "language").strip() == language.table(rows)
    for name in ("bits", "frontier"):
        assert table_in(text, f"language {name}").strip() == language.TABLES[name](rows)
    tuning = " ".join(TUNING.split())
    for measured in (rows, language.read(language.RESULTS.with_name("language-wide.json"))):
        plain = share(measured, "two-sided signs", 8, 16, d=2)
        ranked = share(measured, AUTO, 8, 4, d=2)
        assert f"from {plain.mean:.1f} to {ranked.mean:.1f} %" in tuning
        assert f"at {ranked.bits:.2f} instead of {plain.bits:.2f} bits" in tuning
    assert f"groups of 4 keep {share(rows, 'two-sided signs', 4, 16, d=2).mean:.1f}" in tuning
    wide = language.read(language.RESULTS.with_name("language-wide.json"))
    assert table_in(text, "language wide").strip() == language.table_of_frontier(wide)


def share(rows: Rows, method: str, group: int, coordinates: int, d: float = 4) -> language.Share:
    """What survives with D in so many bits."""
    found = language.shares(rows, method, group, d, coordinates)
    assert found is not None
    return found


def test_what_compress_does_by_default_keeps_the_most_at_its_storage() -> None:
    for name in ("language.json", "language-wide.json"):
        rows = language.read(language.RESULTS.with_name(name))
        for group in language.groups_of(rows):
            auto = share(rows, AUTO, group, 4)
            fixed = [share(rows, f"shared basis of rank {rank}", group, 4) for rank in (4, 8, 16, 32, 64)]
            more = next(number for number, other in enumerate(fixed) if other.bits > auto.bits)
            below, above = fixed[more - 1 : more + 1]
            between = (auto.bits - below.bits) / (above.bits - below.bits)
            assert auto.mean > below.mean + between * (above.mean - below.mean)
    rows = language.read(language.RESULTS)
    smaller = share(rows, "two-sided signs", 4, 16)
    assert share(rows, AUTO, 8, 4).bits < smaller.bits
    assert share(rows, AUTO, 8, 4).mean > smaller.mean + 2


def test_the_tables_of_the_papers_claims_are_those_of_the_rows() -> None:
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    rows = claim_tables.read(claims.RESULTS)
    for name, table in claim_tables.TABLES.items():
        command = f"python bench/quality/claims.py --table {name}"
        found = re.search(rf"<!-- claims {name}: {command} -->\n(.*?)\n<!-- /claims {name} -->", text, re.DOTALL)
        assert found is not None
        assert found[1] == table(rows)


def test_the_papers_claims_hold_as_the_page_says() -> None:
    rows = claim_tables.read(claims.RESULTS)
    chosen, mean = claim_tables.chosen, claim_tables.mean
    assert {row["seed"] for row in rows if row["experiment"] != "times"} == set(claims.SEEDS)
    *_, both, ours = claims.METHODS
    for count in claims.COUNTS[1:]:  # two models interfere too little to tell
        kept = [mean(chosen(rows, "count", method=method, models=count), "kept") for method in claims.METHODS]
        assert kept == sorted(kept)
        if count >= 8:
            assert 0.2 < (1 - kept[-1]) / (1 - kept[-2]) < 0.4
    for method in (both, ours, "column signs alone"):
        alike = [mean(chosen(rows, "similarity", method=method, set=name), "kept") for name in
                 claim_tables.distinct(rows, "similarity", "set")]  # fmt: skip
        assert max(alike) - min(alike) < 0.02
        by_alpha = {alpha: mean(chosen(rows, "alpha", method=method, alpha=alpha), "kept") for alpha in claims.ALPHAS}
        assert max(by_alpha, key=by_alpha.__getitem__) == 1.0
    assert all(row["bytes_as_if_never_there"] for row in chosen(rows, "leaving"))


def test_the_claims_are_measured_as_the_rows_say() -> None:
    """On two untrained models: every experiment gives the entries that the tables read."""
    torch.manual_seed(0)
    base = claims.DigitEncoder(32, depth=2)
    tasks = claims.sets()["distinct"][:2]
    held_out = claims.load(0)[1]
    models: dict[str, nn.Module] = {task.name: claims.DigitEncoder(32, depth=2) for task in tasks}
    tuned = claims.Finetunes(base, models, {task.name: task.of(held_out) for task in tasks}, 0)
    found = [next(iter(claims.by_similarity({"distinct": tuned}))), next(iter(claims.by_alpha(tuned)))]
    found += list(claims.by_coming_and_going(tuned))[:3]
    committed = {row["experiment"]: row.keys() - {"seed"} for row in claim_tables.read(claims.RESULTS)}
    assert [row.keys() for row in found] == [committed[row["experiment"]] for row in found]


def test_the_digits_table_by_bits_is_that_of_the_rows() -> None:
    shown = table_in(RESULTS, "quality bits")
    assert shown.strip() == quality.table_of_bits(quality.read(quality.BITS_RESULTS))


def test_the_table_of_kernels_is_that_of_the_rows() -> None:
    shown = table_in(SPEED, "kernels")
    assert shown.strip() == plots.table(KERNEL_ROWS)


def test_every_row_says_what_it_ran_on_and_beside_what() -> None:
    keys = {
        "op", "path", "tile", "shape", "m", "models", "mix", "transform", "dtype", "median_us", "p20_us", "p80_us",
        "eager_us", "bytes", "flops", "roofline_share", "ratio_to_linear", "gain_over_materialised", "peak_bytes",
        "error", "materialised_error", "device", "driver", "torch", "triton", "commit", "recreated",
    }  # fmt: skip
    assert [keys - row.keys() for row in KERNEL_ROWS if not keys <= row.keys()] == []


def test_the_cpu_reaches_what_the_readme_says_of_it() -> None:
    def superposed(m: int, dtype: str) -> list[float]:
        wide = [row for row in KERNEL_ROWS if row["shape"] == "4096x4096" and (row["m"], row["dtype"]) == (m, dtype)]
        return [row["ratio_to_linear"] for row in wide if row["op"] == plots.OP and plots.is_default(row)]

    assert max(superposed(512, "fp32")) <= 1.3
    for dtype in ("fp32", "bf16"):
        assert max(superposed(8, dtype)) <= 2.5


PAGES = [
    ("guarantees", "architectures"), ("transformers", "architecture table"), ("transformers", "architecture refusals"),
]  # fmt: skip


@pytest.mark.parametrize(("page", "table"), PAGES)
def test_the_tables_of_architectures_are_those_of_the_rows(page: str, table: str) -> None:
    measured = json.loads(architecture_sweep.RESULTS.read_text())
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    assert table_in(text, table).strip() == architecture_tables.TABLES[table](measured)


def test_no_architecture_answers_wrongly_or_is_refused_late() -> None:
    rows = json.loads(architecture_sweep.RESULTS.read_text())["rows"]
    outcomes = {architecture_sweep.kind(row[way]) for row in rows for way in architecture_tables.WAYS}
    assert outcomes <= {"right", "refused", "not run", "indistinct", ""}
    assert len({row["model_type"] for row in rows if row["disk"] == "right"}) >= 230


def test_the_real_models_table_is_that_of_the_rows() -> None:
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    rows = language.read(smollm_kept.RESULTS)
    assert table_in(page, "smollm").strip() == smollm_kept.table(rows)
    assert table_in(page, "smollm more").strip() == smollm_kept.table(rows, smollm_kept.TABLES["more"])


def test_the_table_beside_other_methods_is_that_of_the_rows() -> None:
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    shown = table_in(page, "rivals")
    rows, ours = language.read(rivals.RESULTS), language.read(smollm_kept.RESULTS)
    assert shown.strip() == rivals.table(rows, ours)
    first = table_in(page, "rivals short")
    assert first.strip() == rivals.short_table(rows, ours)
    assert first.count("\n") == 9
    late = table_in(page, "smollm late")
    assert late.strip() == smollm_late.table(language.read(smollm_late.RESULTS))


def test_what_is_chosen_for_the_real_model_is_what_its_rows_say() -> None:
    for row in language.read(smollm_kept.RESULTS):
        config = randes.Config(group_size=row["group"], rank=row["rank"], matrix=row["matrix"])
        if row["embeddings"] not in BY_TABLES or row["rank"] not in ("auto", 0) or row["group"] == 1:
            continue
        found = predicted(config, row["models"], row["bits"], row["embeddings"])
        assert found == pytest.approx(100 * sum(row["kept"]) / len(row["kept"]), abs=0.4), row
