"""Oracle page: choices of key blocks against their definition, on any model, from one forward pass."""

import json
from importlib import import_module

import pytest
import torch

import graftwork as gw
from graftwork.cli.app import run as command
from graftwork.errors import ConfigError
from graftwork.grafting.converted import Converted
from graftwork.methods.sparsefinder.graph_report.oracle import BEST, GOLD, MEAN_POOLED, PAGES, WINDOW, measure_choices
from graftwork.methods.sparsefinder.graph_report.oracle_page import choice_findings, choice_table
from graftwork.methods.sparsefinder.modules import observe_calls, sparsefinder_modules
from graftwork.surgery.modules import undo_steps
from tiny_models import VOCABULARY, tiny_model, word_tokenizer


def batch(tokens=24, rows=2, short=17):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, VOCABULARY, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[1:, short:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def loop_choices(query, key, scale, length, causal, size, budget):
    """Recall and mass of the mean-pooled, window and best choices of one head, by loops over blocks."""
    scores = ((query[:length] * scale) @ key[:length].T).double()
    allowed = torch.ones(length, length).tril().bool() if causal else torch.ones(length, length).bool()
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    gold = torch.zeros_like(allowed)
    for row in range(length):
        total = 0.0
        for column in weights[row].argsort(descending=True):
            if total >= 0.95:
                break
            gold[row, column] = True
            total += float(weights[row, column])
    blocks = [(i, j) for i in range(-(-length // size)) for j in range(-(-length // size))]
    part = {(i, j): (slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size)) for i, j in blocks}
    blocks = [block for block in blocks if allowed[part[block]].any()]
    count = max(1, int(budget * len(blocks)))
    values = {
        "recall": {block: float(gold[part[block]].sum()) for block in blocks},
        "mass": {block: float(weights[part[block]].sum()) for block in blocks},
        MEAN_POOLED: {
            (i, j): float(
                query[:length][i * size : (i + 1) * size].mean(0) @ key[:length][j * size : (j + 1) * size].mean(0)
            )
            for i, j in blocks
        },
        WINDOW: {(i, j): -abs(i - j) for i, j in blocks},
    }
    kept = {name: sorted(blocks, key=lambda block, own=own: -own[block])[:count] for name, own in values.items()}

    def share(name, field):
        return sum(values[field][block] for block in kept[name]) / sum(values[field].values())

    return {
        MEAN_POOLED: (share(MEAN_POOLED, "recall"), share(MEAN_POOLED, "mass")),
        WINDOW: (share(WINDOW, "recall"), share(WINDOW, "mass")),
        BEST: (share("recall", "recall"), share("mass", "mass")),
    }


@pytest.mark.parametrize(("family", "causal"), [("roberta", False), ("llama", True)])
def test_choices_are_those_of_loops_over_blocks(family, causal):
    converted = gw.convert(tiny_model(family, dtype=torch.float32), gw.Sparsefinder(alpha=1.0))
    calls = {}
    with observe_calls(converted.model, lambda graft, call: calls.setdefault(id(graft), call)), torch.no_grad():
        converted.model(**batch())
    found = measure_choices(converted.model, batch(), budgets=[0.3], block_size=5)
    for path, graft in sparsefinder_modules(converted.model).items():
        call = calls[id(graft)]
        for head in range(graft.heads):
            group = head * call.key.shape[1] // graft.heads
            rows = [
                loop_choices(call.query[row, head], call.key[row, group], call.scale, length, causal, 5, 0.3)
                for row, length in ((0, 24), (1, 17))
            ]
            for name in (MEAN_POOLED, WINDOW, BEST):
                own = next(each for each in found if (each.module, each.name) == (path, name))
                assert own.recall[head] == pytest.approx(sum(row[name][0] for row in rows) / 2, abs=1e-4)
                assert own.mass[head] == pytest.approx(sum(row[name][1] for row in rows) / 2, abs=1e-4)


def test_nothing_exceeds_the_best_possible_choice_and_a_whole_budget_keeps_everything():
    converted = gw.convert(tiny_model("bert", dtype=torch.float32), gw.Sparsefinder(grouping="random", threshold=0.5))
    found = measure_choices(converted.model, batch(), budgets=[0.2, 1.0], block_size=4)
    assert {each.name for each in found} == {GOLD, WINDOW, MEAN_POOLED, PAGES, BEST, "predicted (random)"}
    for each in found:
        if each.budget is not None:
            best = next(one for one in found if (one.module, one.budget, one.name) == (each.module, each.budget, BEST))
            assert all(a <= b + 1e-6 for a, b in zip(each.recall + each.mass, best.recall + best.mass, strict=True))
        if each.name == GOLD or (each.budget == 1.0 and not each.name.startswith("predicted")):
            assert each.recall == pytest.approx([1.0] * len(each.recall))
    table = choice_table(found)
    assert [row["choice"] for row in table if row["budget"] is None] == [GOLD]
    assert len(choice_findings(found)) == 3


def test_a_budget_beyond_all_blocks_is_refused():
    converted = gw.convert(tiny_model("bert", dtype=torch.float32), gw.Sparsefinder())
    with pytest.raises(ConfigError, match="above 0, up to 1"):
        measure_choices(converted.model, batch(), budgets=[1.5])


def test_the_command_writes_a_page_for_a_model_and_leaves_it_dense(tmp_path, capsys):
    model = tiny_model("llama", dtype=torch.float32)
    model.save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("\n".join(" ".join(f"w{(7 * i + j) % 20 + 4}" for j in range(15)) for i in range(30)))
    words = ["graphs", str(tmp_path / "model"), "--task", str(text), "--split", "all", "--oracle"]
    assert command([*words, "--samples", "2", "--max-input-tokens", "32"]) == 2
    assert "Give --output" in capsys.readouterr().err
    words += ["--samples", "2", "--max-input-tokens", "32", "--budgets", "0.25", "--block-size", "8"]
    assert command([*words, "-o", str(tmp_path / "page"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["choice"] for row in rows] == [GOLD, WINDOW, MEAN_POOLED, PAGES, BEST]
    page = (tmp_path / "page" / "oracle.html").read_text()
    for piece in ("Mean over layers and heads", "2 sequences of 32 tokens", "best possible", "data:image/png"):
        assert piece in page
    assert command([*words, "--cost-lengths", "8"]) == 2
    assert "Found --cost-lengths with --oracle" in capsys.readouterr().err
    assert command(["graphs", "x", "--task", str(text), "--budgets", "0.5"]) == 2
    assert "Found --budgets without --oracle" in capsys.readouterr().err


def test_measuring_restores_an_untouched_model(tmp_path, monkeypatch):
    oracle_page = import_module("graftwork.methods.sparsefinder.graph_report.oracle_page")
    monkeypatch.setattr(oracle_page, "_write", lambda *arguments: None)
    model = tiny_model("llama", dtype=torch.float32)
    converted = Converted(model, tokenizer=word_tokenizer())
    text = tmp_path / "text.txt"
    text.write_text("\n".join(" ".join(f"w{(3 * i + j) % 20 + 4}" for j in range(15)) for i in range(10)))
    before = model(**batch()).logits
    settings = {"split": "all", "samples": 1, "max_input_tokens": 16, "block_size": 4, "output": tmp_path}
    assert oracle_page.oracle_page(converted, [str(text)], **settings).choices
    assert not undo_steps(model)
    assert torch.equal(model(**batch()).logits, before)


def test_a_run_is_measured_on_all_scores_with_its_own_choice_within_the_budget():
    """The hidden states are those of all scores, and blocks are chosen with the budget of the page."""
    found = {}
    model = tiny_model("llama", dtype=torch.float32)
    for name, settings in (("none", {}), ("blocks", {"grouping": "mean_pooled", "block_size": 4, "block_budget": 0.2})):
        converted = gw.convert(model, gw.Sparsefinder(**settings), copy=True)
        found[name] = measure_choices(converted.model, batch(), budgets=[0.2, 0.6], block_size=4)
        assert all(graft.override is None for graft in sparsefinder_modules(converted.model).values())
    own = [each for each in found["blocks"] if each.name == "predicted (mean_pooled)"]
    assert [each for each in found["blocks"] if each not in own] == found["none"]
    few, many = ([each for each in own if each.budget == budget] for budget in (0.2, 0.6))
    for less, more in zip(few, many, strict=True):
        assert all(a < b for a, b in zip(less.mass, more.mass, strict=True))
        # the own block, which every query keeps, has a part of the allowed pairs of a past block
        assert all(mass > 0.15 for mass in less.mass)
