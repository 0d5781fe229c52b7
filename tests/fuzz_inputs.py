"""A small valid input for every reader of files, which `fuzz_readers` mutates."""

from __future__ import annotations

import csv
import gzip
import io
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fuzz_own_data import csv_lines, own
from fuzz_reader import Read, Reader, dump, dump_lines, items_of, lines_of, rows_below_header
from graftwork.core.config import build, read_yaml
from graftwork.core.files import read_json, read_lines
from graftwork.methods.regrad.bank import transfer
from graftwork.methods.regrad.importing import _load as load_adapter
from graftwork.methods.regrad.text.authors_prompts import authors_prompts
from graftwork.methods.regrad.text.pairs import read_pairs
from graftwork.methods.sparsefinder.legacy import import_dump, read_centroids, read_projections
from graftwork.metrics.results import Results
from graftwork.pipeline.model_files import check_weights
from graftwork.reporting.comparison import read_predictions
from graftwork.reporting.render import read_extras
from graftwork.retrieval.corpus import CorpusReader, find_corpus
from graftwork.settings.evaluation import EvaluationSettings
from graftwork.settings.fields import DataFields
from graftwork.settings.recipe import load_recipe
from graftwork.settings.training import TrainingSettings
from graftwork.tasks import get_task, prompts
from graftwork.tasks.augmentation import read_augmented
from graftwork.tasks.inputs import read_inputs
from graftwork.tasks.multihop import DATASETS, MultihopSource
from graftwork.tasks.prepare import load_prepared
from graftwork.tasks.prompts import prompt_family
from graftwork.tasks.sources import read_csv, read_json_lines, read_tsv
from graftwork.tasks.unifiedqa import read_raw


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def tensors(value: dict[str, torch.Tensor]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        save_file(value, Path(folder) / "x.safetensors")
        return (Path(folder) / "x.safetensors").read_bytes()


def table(path: Path) -> int:
    return own(path, DataFields())


def source(name: str, split: str) -> Read:
    def read(path: Path) -> int:
        folder = next(parent for parent in path.parents if parent.name == "input")
        examples = get_task(name).load(folder, split)
        return len(examples.rows) + examples.ignored

    return read


def multihop(name: str) -> Read:
    return lambda path: len(MultihopSource(DATASETS[name])(path.parent, "dev").rows)


def corpus(path: Path) -> int:
    reader = CorpusReader(find_corpus(path))
    list(reader)
    return reader.count + reader.malformed


def unifiedqa(path: Path) -> int:
    records = read_raw(path.parent, "dev", "boolq")
    return len(records.rows) + records.ignored


def settings(cls: type) -> Read:
    return lambda path: build(cls, read_yaml(path), where=str(path))


def csv_records(content: bytes) -> int:
    text = content.decode("utf-8-sig").replace("\r\n", "\n")
    return sum(1 for _ in csv.reader(io.StringIO(text, newline=""))) - 1


def dumped(path: Path) -> None:
    out = path.parent / "imported"
    import_dump(path, out)


def exported(path: Path) -> None:
    shutil.rmtree(path.parent / "bank", ignore_errors=True)
    transfer.import_export(path.parent, path.parent / "bank", precision="float32")


def readers() -> dict[str, Reader]:
    """All readers by name."""
    answer = {"question": "Who?", "answers": [{"answer": "A", "aliases": ["B", None]}], "ID": "1"}
    passage = {"_id": "1", "text": "some text", "title": "t"}
    evidence = {"docid": "d", "start_token": 0, "end_token": 1, "start_sentence": 0, "end_sentence": 1, "text": "x"}
    movie = {"annotation_id": "d", "classification": "POS", "evidences": [[evidence]], "query": "q", "query_type": None}
    multirc = {**movie, "classification": "True", "query": "Q || A", "docids": ["d"]}
    documents = dump_lines([{"docid": "d", "document": "x y ."}, {"docid": "e", "document": "z"}])
    choices = [{"label": "A", "text": "one"}, {"label": "B", "text": "two"}]
    question = {"id": "q", "answerKey": "A", "question": {"stem": "s", "choices": choices}}
    explanation = {"id": "q", "explanation": {"open-ended": "because", "selected": "s"}}
    augmented = [
        {
            "test_id": n,
            "question": f"q{n}",
            "answer": ["a", "b"],
            "passages": ["p", "r"],
            "passage_ids": ["1", "2"],
            "titles": ["t", "u"],
            "scores": [1.0, 0.5],
        }
        for n in range(2)
    ]
    prepared = [
        {"input": "a", "ans": "b", "all_answers": ["b"], "dataset": "boolq", "split": "dev", "split_size": 2}
    ] * 2
    pairs = [{"id": str(n), "rewrite": "r", "pairs": [{"question": "q", "answer": "a"}]} for n in range(2)]
    gradient = {"0_0": {"w": torch.ones(2, 3)}, "1_1": {"w": torch.zeros(2, 3)}}
    attention = [torch.ones(1, 2, 3, 4), torch.ones(1, 2, 5, 4)]
    state = {"w": torch.ones(2, 4, 3), "b": torch.ones(2, 1, 3)}
    export = {
        "schema": 1,
        "fingerprint": {"a": "b"},
        "layout": [["w", [2, 3]]],
        "recorded": {},
        "files": ["gradients-00001.safetensors"],
        "ids": {"p": "k"},
        "records": {"k": {"tokens": 3, "loss": 0.5, "norm": 1.0, "truncated": False}},
    }
    results = {
        "model": "m",
        "method": "topk",
        "rows": [{"task": "t", "split": "dev", "label": "dense", "scores": {"em": 1.5}, "size": 3}],
        "measures": {"dense": {"kept": 0.5}},
        "training": {"t": {"loss": 1.0}},
        "curves": {"t": {"loss": [[1, 0.5]]}},
    }
    extras = {
        "pictures": [{"file": "a.png", "title": "t", "wide": True}],
        "tables": [{"title": "t", "columns": ["a"], "rows": [["b"]]}],
    }
    recipe = (
        b"model: m\nmethod: {name: topk, feed_forward_k: 64}\ndata: d\nseed: 1\ntrain:\n  tasks: [unifiedqa/boolq]\n"
        b"  learning_rate: 1e-4\n  max_steps: 5\nevaluate:\n  tasks: [unifiedqa/boolq]\nover: {method.feed_forward_k: "
        b"[1, 2]}\npublished:\n- {task: t, metric: em, value: 1.0, tolerance: 0.5, source: s, at: {a: 1}}\n"
    )
    tsv = b'id\ttext\ttitle\n1\tsome text\tt\n2\t"quoted ""text"""\tu\n3\tmore\tv\n'
    sst = b"sentence\tlabel\nfine\t1\nbad\t0\n"
    qqp = b"id\tquestion1\tquestion2\tis_duplicate\n1\ta\tb\t1\n2\tc\td\t0\n"
    mnli = b"index\tsentence1\tsentence2\tgold_label\n0\ta\tb\tneutral\n1\tc\td\tentailment\n"
    esnli = b"pairID,gold_label,Sentence1,Sentence2,Explanation_1,Explanation_2,Explanation_3\n"
    esnli += b'1,neutral,a,"b, ""c""",e,f,g\n'
    popqa = b'id\tobj\tquestion\to_aliases\tpossible_answers\n1\ta\tq?\t["b"]\t["c"]\n2\tb\tr?\t[]\t"[""d""]"\n'
    amazon = b"star_rating\treview_headline\treview_body\n" + b"5\th\tb\n" * 12
    weights = {"a": torch.ones(3), "b": torch.zeros(2, 2)}
    pieces = ["ICLprompt" + name for name in ("_context", "_context_yn", "_context_5choices")]
    pieces += ["ICLprompt_context_blind" + name for name in ("", "_yn", "_5choices")]
    pieces += ["ICLprompt_question", "ICLprompt_question_5choices"]
    authors_source = "".join(f'{name} = """a {{context}} {{{{b}}}}"""\n' for name in pieces if "context" in name)
    authors_source += "".join(f'{name} = """{{question}} {{c0}}"""\n' for name in pieces if "question" in name)
    line = {"question": "q", "answer": "yes", "id": 1, "choices": list("abcde")}
    found = {
        "json": Reader("x.json", dump([answer, {"a": [1, 2.5, "x"]}]), read_json),
        "own_lines": Reader("x.jsonl", dump_lines([{"a": 1}, {"b": "x"}]), lambda path: list(read_lines(path))),
        "json_lines": Reader(
            "x.jsonl", dump_lines([answer, [1], "x"]), lambda path: len(list(read_json_lines(path))), records=lines_of
        ),
        "recipe": Reader("run.yaml", recipe, load_recipe),
        "training": Reader(
            "t.yaml", b"tasks: [a]\nlearning_rate: 1e-4\nmax_steps: 3\ntake: 4\n", settings(TrainingSettings)
        ),
        "evaluation": Reader("t.yaml", b"tasks: [a]\nlimit: 3\nbaseline: true\n", settings(EvaluationSettings)),
        "prompt_family": Reader(
            "family.yaml",
            (Path(prompts.__file__).parent / "prompt_families" / "simple.yaml").read_bytes(),
            lambda path: prompt_family(str(path)),
        ),
        "authors_prompts": Reader(
            "src/ICL.py", authors_source.encode(), lambda path: authors_prompts(path.parents[1], simple=False)
        ),
        "corpus_tsv": Reader("c.tsv", tsv, corpus),
        "corpus_jsonl": Reader("c.jsonl", dump_lines([passage, {**passage, "_id": "2"}]), corpus, records=lines_of),
        "corpus_gz": Reader("c.tsv.gz", gzip.compress(tsv * 20), corpus),
        "corpus_jsonl_gz": Reader("c.jsonl.gz", gzip.compress(dump_lines([passage])), corpus),
        "tsv": Reader("x.tsv", qqp, lambda path: read_tsv(path).lines, records=rows_below_header),
        "csv": Reader("x.csv", esnli, lambda path: read_csv(path).lines, records=csv_records),
        "sst2": Reader("input/SST-2/dev.tsv", sst, source("glue/sst2", "dev"), records=rows_below_header),
        "qqp": Reader("input/QQP/dev.tsv", qqp, source("glue/qqp", "dev")),
        "mnli": Reader("input/MNLI/train.tsv", mnli, source("mnli_v002", "train")),
        "table": Reader("x.csv", b"label,sentence1\na,b\nc,d\n", table, records=csv_lines),
        "table_tsv": Reader(
            "x.tsv", b"label\ttext\na\tb\nc\td\n", table, records=lambda content: lines_of(content) - 1
        ),
        "imdb": Reader(
            "input/dev/neg/1.txt", b"bad film", source("reviews/imdb", "dev"), (("input/dev/pos/1.txt", b"good"),)
        ),
        "wikitext": Reader(
            "input/wikitext-2/wiki.valid.tokens", b" a b \n\n = c = \n", source("wikitext/2", "dev"), records=lines_of
        ),
        "unifiedqa": Reader("dev.tsv", b"q \\n c\tyes\nr \\n d\tno\n", unifiedqa),
        "unifiedqa_answers": Reader(
            "dev_ans.jsonl",
            dump_lines([["yes"], ["no", "nope"]]),
            unifiedqa,
            (("dev.tsv", b"q \\n c\tyes\nr \\n d\tno\n"),),
        ),
        "unifiedqa_meta": Reader("dev_meta.tsv", b"x\tA\ny\tB\n", unifiedqa, (("dev.tsv", b"q\tyes\nr\tno\n"),)),
        "prepared": Reader(
            "p.jsonl",
            dump_lines(prepared),
            lambda path: sum(len(e.rows) for e in load_prepared(path)),
            records=lines_of,
        ),
        "inputs": Reader(
            "i.jsonl",
            dump_lines([{"input": "a"}, {"input": "b", "id": 3}]),
            lambda path: len(read_inputs(path, EvaluationSettings())),
            records=lines_of,
        ),
        "inputs_txt": Reader(
            "i.txt", b"one\ntwo\n", lambda path: len(read_inputs(path, EvaluationSettings())), records=lines_of
        ),
        "inputs_prompt": Reader(
            "i.jsonl",
            dump_lines([{"premise": "a", "hypothesis": "b"}]),
            lambda path: read_inputs(path, EvaluationSettings(prompt="esnli_v010")),
        ),
        "2wiki": Reader(
            "dev.json",
            dump([{"_id": "1", "question": "q", "answer": "a", "answer_id": "Q1"}]),
            multihop("2wikimultihopqa"),
            records=items_of,
        ),
        "2wiki_aliases": Reader(
            "id_aliases.json",
            dump_lines([{"Q_id": "Q1", "aliases": ["b"], "demonyms": ["c"]}]),
            multihop("2wikimultihopqa"),
            (("dev.json", dump([{"_id": "1", "question": "q", "answer": "a", "answer_id": "Q1"}])),),
        ),
        "hotpot": Reader(
            "hotpot_dev_distractor_v1.json",
            dump([{"_id": "1", "question": "q", "answer": "a"}] * 2),
            multihop("hotpotqa"),
            records=items_of,
        ),
        "popqa": Reader("popQA.tsv", popqa, multihop("popqa")),
        "cwq": Reader(
            "ComplexWebQuestions_dev.json", dump([answer, answer]), multihop("complexwebquestions"), records=items_of
        ),
        "pubmedqa": Reader("dev.jsonl", dump_lines([line] * 2), multihop("pubmedqa"), records=lines_of),
        "casehold": Reader("dev.jsonl", dump_lines([line] * 2), multihop("casehold"), records=lines_of),
        "augmented": Reader("dev.json", dump(augmented), multihop("hotpotqa"), records=items_of),
        "read_augmented": Reader(
            "slice.json", dump(augmented), lambda path: len(read_augmented(path)), records=items_of
        ),
        "pairs": Reader("pairs.jsonl", dump_lines(pairs), lambda path: len(read_pairs(path)), records=lines_of),
        "passages": Reader("a.json", dump(augmented), transfer._passages),
        "bank_pt": Reader("g.pt", saved(gradient), transfer._load_original),
        "adapter_pth": Reader("meta_state_dict.pth", saved({"a": torch.ones(2), "b": torch.ones(3, 2)}), load_adapter),
        "export": Reader(
            "export.json", dump(export), exported, (("gradients-00001.safetensors", tensors({"k": torch.arange(6.0)})),)
        ),
        "export_tensors": Reader(
            "gradients-00001.safetensors", tensors({"k": torch.arange(6.0)}), exported, (("export.json", dump(export)),)
        ),
        "legacy_dump": Reader("x_enc-attn.pt", saved({"q": attention, "k": attention, "length_src": [3, 5]}), dumped),
        "projections": Reader("p.pt", saved([{"q": state, "k": state}]), lambda path: read_projections(path, 2)),
        "centroids": Reader("c.pt", saved([torch.ones(2, 1, 3, 4)]), read_centroids),
        "results": Reader("results.json", dump(results), Results.read),
        "extras": Reader("report.json", dump(extras), lambda path: read_extras(path.parent), (("a.png", b"png"),)),
        "predictions": Reader(
            "x.jsonl",
            dump_lines([{"id": "1", "input": "i", "prediction": "p", "answers": ["a"]}]),
            lambda path: read_predictions(path),
        ),
        "summary": Reader(
            "s.json",
            dump({"predictions": {"g": {"answer": {"1": "a"}}}, "per_sample": {"g": {"1": {"answers": ["a"]}}}}),
            lambda path: read_predictions(path),
        ),
        "config": Reader(
            "config.json",
            dump({"model_type": "t5", "auto_map": {}}),
            lambda path: check_weights(path.parent),
            (("model.safetensors", tensors(weights)),),
        ),
        "weights": Reader(
            "model.safetensors",
            tensors(weights),
            lambda path: check_weights(path.parent),
            (("config.json", dump({"model_type": "t5"})),),
        ),
        "shards": Reader(
            "model.safetensors.index.json",
            dump({"weight_map": {"a": "m1.safetensors"}}),
            lambda path: check_weights(path.parent),
            (("config.json", b"{}"), ("m1.safetensors", tensors(weights))),
        ),
        "cos_e_questions": Reader(
            "input/cos_e/dev_rand_split.jsonl",
            dump_lines([question]),
            source("cos_e_v001", "validation"),
            (("input/cos_e/cose_dev_v1.11.jsonl", dump_lines([explanation])),),
        ),
        "cos_e": Reader(
            "input/cos_e/cose_dev_v1.11.jsonl",
            dump_lines([explanation]),
            source("cos_e_v001", "validation"),
            (("input/cos_e/dev_rand_split.jsonl", dump_lines([question])),),
        ),
        "esnli": Reader("input/esnli/esnli_dev.csv", esnli, source("esnli_v010", "validation")),
        "amazon": Reader(
            "input/amazon_reviews_us_Books_v1_00.tsv", amazon, source("amazon_reviews_books_v1_00_v010", "train")
        ),
        "movies": Reader(
            "input/movies/val.jsonl",
            dump_lines([movie] * 2),
            source("movie_rationales_v010", "validation"),
            (("input/movies/docs/d", b"x y ."),),
            records=lines_of,
        ),
        "movies_docs": Reader(
            "input/movies/docs/d",
            b"x y .\nz",
            source("movie_rationales_v010", "validation"),
            (("input/movies/val.jsonl", dump_lines([movie])),),
        ),
        "multirc": Reader(
            "input/multirc/val.jsonl",
            dump_lines([multirc] * 2),
            source("eraser_multi_rc_v011", "validation"),
            (("input/multirc/docs.jsonl", documents),),
        ),
        "multirc_docs": Reader(
            "input/multirc/docs.jsonl",
            documents,
            source("eraser_multi_rc_v011", "validation"),
            (("input/multirc/val.jsonl", dump_lines([multirc])),),
        ),
    }
    return found
