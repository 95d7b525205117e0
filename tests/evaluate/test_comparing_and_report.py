"""Two results side by side, and the page: it says what the folders hold, and nothing a model wrote is markup."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import puna
from puna.cli import run
from puna.errors import PunaError
from puna.evaluate import evaluate
from puna.files import read_json, write_json
from puna.report import what_runs_here
from puna.report.evaluation import evaluation_results, write_evaluation
from puna.testing import write_tiny_tasks


def scored(folder: Path, answers: list[str], **options: Any) -> Path:
    """A folder with the results of one answer a task."""
    folder.mkdir()
    write_tiny_tasks(folder / "tasks.jsonl", len(answers))
    lines = [{"task_id": f"Tiny/{i}", "completion": answer} for i, answer in enumerate(answers)]
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluate(
        "humaneval", samples=folder / "samples.jsonl", data=folder / "tasks.jsonl", output=folder / "run", **options
    )
    return folder / "run"


@pytest.fixture(scope="module")
def folders(bubblewrap: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    place = tmp_path_factory.mktemp("runs")
    right = [f"    return {i}\n" for i in range(5)]
    wrong = "    print('<b>seen</b>')\n    return '</pre><script>alert(1)</script>'\n"
    first = scored(place / "first", [right[0], wrong, right[2], "    return (\n", right[4]])
    second = scored(place / "second", [right[0], right[1], wrong, right[3], right[4]])
    return first, second


def test_what_changed_is_named(folders: tuple[Path, Path]) -> None:
    result = puna.compare(*folders)
    assert (result["gained"], result["lost"], result["tasks"]) == (["Tiny/1", "Tiny/3"], ["Tiny/2"], 5)
    assert result["difference"] == {"pass@1": pytest.approx(0.2)}
    assert (result["first"]["pass@1"], result["second"]["pass@1"]) == (0.6, 0.8)
    low, high = result["intervals"]["pass@1"]
    assert low < 0.2 < high
    same = puna.compare(folders[0], folders[0])
    assert (same["gained"], same["lost"], same["intervals"]) == ([], [], {"pass@1": [0.0, 0.0]})


def test_the_command_says_it_in_a_table_and_in_json(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = map(str, folders)
    assert run(["compare", first, second]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"pass@1 +0.6000 +0.8000 +\+0.2000  -0\.\d+ to \+\d\.\d+: it may be chance\n", printed)
    assert "gained 2: Tiny/1, Tiny/3\nlost 1: Tiny/2" in printed
    assert run(["compare", first, second, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == puna.compare(first, second)


def test_what_does_not_compare_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(PunaError, match=r"holds no result; a run of puna evaluate … -o DIR writes one"):
        puna.compare(tmp_path, folders[0])
    other = tmp_path / "other"
    other.mkdir()
    result = json.loads((folders[0] / "result.json").read_text())
    (other / "result.json").write_text(json.dumps(result | {"data": {"file": "x", "sha256": "0"}}))
    with pytest.raises(PunaError, match=r"do not compare: their data is .* and .*'sha256': '0'"):
        puna.compare(folders[0], other)
    (other / "result.json").write_text(json.dumps(result))
    lines = (folders[0] / "details.jsonl").read_text().splitlines(keepends=True)
    (other / "details.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(PunaError, match=r"only one of them has the task Tiny/4"):
        puna.compare(folders[0], other)


def test_cases_of_completion_compare_too(
    tmp_path: Path, tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "code").mkdir()
    for name in "abcde":
        (tmp_path / f"code/{name}.py").write_text(f"import os\n\n\ndef {name}():\n    return os.getcwd()\n")
    options: dict[str, Any] = {"corpus": tmp_path / "code", "max_tokens": 3, "device": "cpu"}
    for name in ("one", "two"):
        evaluate("completion", str(tiny_model_folder), output=tmp_path / name, **options)
    result = puna.compare(tmp_path / "one", tmp_path / "two")
    assert (result["tasks"], result["gained"], result["lost"]) == (15, [], [])
    assert result["difference"]["bits_per_byte"] == 0
    assert run(["compare", str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    assert re.search(
        r"bits_per_byte .* \+0.0000 to \+0.0000: it may be chance; less is better", capsys.readouterr().out
    )
    assert result["settings"] == {}
    evaluate("completion", str(tiny_model_folder), output=tmp_path / "int8", cache_dtype="int8", **options)
    assert puna.compare(tmp_path / "one", tmp_path / "int8")["settings"] == {"options.cache_dtype": [None, "int8"]}


def test_of_few_files_no_difference_is_called_more_than_chance(
    tmp_path: Path, tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.py").write_text("import os\n\n\ndef f():\n    return os.getcwd()\n")
    options: dict[str, Any] = {"corpus": tmp_path / "a.py", "max_tokens": 3, "device": "cpu"}
    for name in ("fp32", "bf16"):
        evaluate("completion", str(tiny_model_folder), output=tmp_path / name, dtype=name, **options)
    assert set(puna.compare(tmp_path / "fp32", tmp_path / "bf16")["intervals"].values()) == {None}
    assert run(["compare", str(tmp_path / "fp32"), str(tmp_path / "bf16")]) == 0
    said = capsys.readouterr().out
    assert re.search(r"bits_per_byte .*  too few files or tasks to say how sure that is; less is better\n", said)
    assert "chance" not in said


def test_every_score_has_an_interval_of_its_difference_document_by_document(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    documents = {f"code/{i}.py": int(rng.integers(100, 9000)) for i in range(30)}
    bits = {name: rng.uniform(0.5, 8.0) for name in documents}  # far more different than the two models are
    for folder, factor in (("one", 1.0), ("two", 0.97)):
        (tmp_path / folder).mkdir()
        lines = [
            {"document": name, "nats": bits[name] * factor * math.log(2) * size, "tokens": 9, "bytes": size}
            for name, size in documents.items()
        ]
        (tmp_path / folder / "documents.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        case = {"kind": "line", "line": 2, "exact_match": False}
        lines = [{**case, "document": name, "edit_similarity": 0.5 / factor} for name in documents]
        (tmp_path / folder / "cases.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        total = sum(bits[name] * factor * size for name, size in documents.items()) / sum(documents.values())
        result = {"benchmark": "completion", "exact_match": 0.0, "edit_similarity": 0.5 / factor}
        write_json(tmp_path / folder / "result.json", {**result, "bits_per_byte": total})
    result = puna.compare(tmp_path / "one", tmp_path / "two")
    low, high = result["intervals"]["bits_per_byte"]
    assert low < result["difference"]["bits_per_byte"] < high < 0
    assert high - low < 0.3 * abs(low)
    assert result["intervals"]["exact_match"] == [0.0, 0.0]
    assert result["intervals"]["edit_similarity"] == pytest.approx([0.5 / 0.97 - 0.5] * 2)
    (tmp_path / "one/documents.jsonl").unlink()  # as earlier versions left it
    assert set(puna.compare(tmp_path / "one", tmp_path / "two")["intervals"]) == {"exact_match", "edit_similarity"}


def test_other_texts_of_the_same_names_do_not_compare(tmp_path: Path, tiny_model_folder: Path) -> None:
    (tmp_path / "code").mkdir()
    options: dict[str, Any] = {"corpus": tmp_path / "code", "cases": 1, "max_tokens": 1, "device": "cpu"}
    for name in ("one", "two"):
        (tmp_path / "code/a.py").write_text(f"import os\n\n\ndef f():\n    return os.{name}()\n")
        evaluate("completion", str(tiny_model_folder), output=tmp_path / name, **options)
    with pytest.raises(PunaError, match="do not compare: their corpus_sha256 is "):
        puna.compare(tmp_path / "one", tmp_path / "two")
    result = read_json(tmp_path / "one/result.json")
    del result["corpus_sha256"]  # as earlier versions wrote it
    write_json(tmp_path / "one/result.json", result)
    assert puna.compare(tmp_path / "one", tmp_path / "two")["benchmark"] == "completion"
    write_json(tmp_path / "one/result.json", {**result, "corpus": "elsewhere"})
    with pytest.raises(PunaError, match="do not compare: their corpus is elsewhere and "):
        puna.compare(tmp_path / "one", tmp_path / "two")


def test_perplexities_of_other_lengths_do_not_compare_and_the_table_says_so(
    tmp_path: Path, tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.py").write_text("import os\n" * 100)
    for length in (16, 32):
        options: dict[str, Any] = {"corpus": tmp_path / "a.py", "length": length, "device": "cpu"}
        evaluate("perplexity", str(tiny_model_folder), output=tmp_path / str(length), **options)
    with pytest.raises(PunaError, match="do not compare: their length is 16 and 32"):
        puna.compare(tmp_path / "16", tmp_path / "32")
    short = tmp_path / "short"
    shutil.copytree(tiny_model_folder, short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    command = ["evaluate", "perplexity", str(tiny_model_folder), str(short), "--corpus", str(tmp_path / "a.py")]
    assert run([*command, "--device", "cpu"]) == 0
    assert re.search(r"short do not compare: their length is \d+ and 64", capsys.readouterr().err)


def test_what_differs_beside_the_answers_is_said(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(folders[1], other)
    result = json.loads((other / "result.json").read_text())
    result["limits"]["cpu_seconds"] = 9
    (other / "result.json").write_text(json.dumps(result))
    assert puna.compare(folders[0], other)["settings"]["limits.cpu_seconds"] == [3, 9]
    assert run(["compare", str(folders[0]), str(other)]) == 0
    assert "they differ in limits.cpu_seconds: 3 and 9\n" in capsys.readouterr().out


def test_a_folder_with_a_result_of_another_benchmark_or_model_is_left_as_it_is(
    folders: tuple[Path, Path], tmp_path: Path, tiny_model_folder: Path
) -> None:
    (tmp_path / "a.py").write_text("import os\n" * 100)
    options: dict[str, Any] = {"corpus": tmp_path / "a.py", "device": "cpu"}
    with pytest.raises(PunaError, match="of another run: its benchmark is humaneval, this one's perplexity; choose"):
        evaluate("perplexity", str(tiny_model_folder), output=folders[0], **options)
    evaluate("perplexity", str(tiny_model_folder), output=tmp_path / "out", **options)
    evaluate("perplexity", str(tiny_model_folder), output=tmp_path / "out", **options)
    again = tmp_path / "again"
    shutil.copytree(tiny_model_folder, again)
    with pytest.raises(PunaError, match="holds the result of another run: its model is "):
        evaluate("perplexity", str(again), output=tmp_path / "out", **options)


@pytest.mark.parametrize("change", [{"cases": 2}, {"max_tokens": 2}, {"dtype": "bf16"}, {"max_documents": 9}])
def test_a_folder_with_answers_to_other_questions_is_left_as_it_is(
    tmp_path: Path, tiny_model_folder: Path, change: dict[str, Any]
) -> None:
    (tmp_path / "a.py").write_text("import os\n" * 9)
    options: dict[str, Any] = {"corpus": tmp_path / "a.py", "cases": 1, "max_tokens": 1, "device": "cpu"}
    evaluate("completion", str(tiny_model_folder), output=tmp_path / "out", **options)
    ((name, value),) = change.items()
    with pytest.raises(PunaError, match=rf"another run: its options.{name} is \w+, this one's {value}; choose another"):
        evaluate("completion", str(tiny_model_folder), output=tmp_path / "out", **options | change)
    evaluate("completion", str(tiny_model_folder), output=tmp_path / "out", max_documents=200, batch=2, **options)
    result = read_json(tmp_path / "out/result.json")
    del result["options"]  # as earlier versions wrote it
    write_json(tmp_path / "out/result.json", result)
    evaluate("completion", str(tiny_model_folder), output=tmp_path / "out", **options | change)


def test_answers_of_another_length_compare_and_it_is_said(tmp_path: Path, tiny_model_folder: Path) -> None:
    (tmp_path / "a.py").write_text("import os\n" * 9)
    for max_tokens in (1, 2):
        options: dict[str, Any] = {"corpus": tmp_path / "a.py", "cases": 1, "max_tokens": max_tokens, "device": "cpu"}
        evaluate("completion", str(tiny_model_folder), output=tmp_path / str(max_tokens), **options)
    assert puna.compare(tmp_path / "1", tmp_path / "2")["settings"] == {"options.max_tokens": [1, 2]}
    evaluate("completion", str(tiny_model_folder), output=tmp_path / "bf16", dtype=torch.bfloat16, **options)
    assert puna.compare(tmp_path / "2", tmp_path / "bf16")["settings"] == {"dtype": ["fp32", "bf16"]}


@pytest.mark.parametrize("stated", [None, "int8"])
def test_what_an_earlier_version_did_not_say_is_no_difference(
    tmp_path: Path, tiny_model_folder: Path, stated: str | None
) -> None:
    (tmp_path / "a.py").write_text("import os\n" * 9)
    options: dict[str, Any] = {"corpus": tmp_path / "a.py", "cases": 1, "max_tokens": 1, "device": "cpu"}
    for name, cache_dtype in (("plain", None), ("int8", "int8")):
        evaluate("completion", str(tiny_model_folder), output=tmp_path / name, cache_dtype=cache_dtype, **options)
    result = read_json(tmp_path / "plain/result.json")
    assert (result.pop("dtype"), result.pop("options")["max_tokens"]) == ("fp32", 1)
    earlier = result if stated is None else result | {"cache_dtype": stated}
    write_json(tmp_path / "earlier/result.json", earlier)
    shutil.copy(tmp_path / "plain/cases.jsonl", tmp_path / "earlier")
    for name, cache_dtype in (("plain", None), ("int8", "int8")):
        said = {} if stated == cache_dtype else {"options.cache_dtype": [stated, cache_dtype]}
        assert puna.compare(tmp_path / "earlier", tmp_path / name)["settings"] == said


@pytest.mark.parametrize("benchmark", ["completion", "perplexity", "key_retrieval", "humaneval"])
def test_a_result_says_what_it_was_computed_in(
    benchmark: str, bubblewrap: str, tmp_path: Path, tiny_model_folder: Path
) -> None:
    (tmp_path / "a.py").write_text("import os\n" * 9)
    of_text: dict[str, Any] = {"corpus": tmp_path / "a.py"}
    options = {
        "completion": {**of_text, "cases": 1, "max_tokens": 1},
        "perplexity": of_text,
        "key_retrieval": {"length": 300, "cases": 1},
        "humaneval": {"data": write_tiny_tasks(tmp_path / "tasks.jsonl", 1), "max_tokens": 1},
    }
    model, tokenizer = puna.load(tiny_model_folder, dtype="bf16")
    assert evaluate(benchmark, model, tokenizer=tokenizer, **options[benchmark])["dtype"] == "bf16"


def test_a_page_can_show_what_is_no_text(bubblewrap: str, tmp_path: Path) -> None:
    folder = scored(tmp_path / "run", ["    return '\ud800'\n"] * 4)
    assert "return &#39;\\ud800&#39;" in write_evaluation([folder], tmp_path / "page.html").read_text()


def test_the_page_shows_scores_every_task_and_each_failure_with_its_output(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    results = evaluation_results([folders[0]])
    (scores,) = [table for table in results["tables"] if table["title"] == "Scores"]
    assert scores["columns"] == ["", "pass@1"]
    assert scores["rows"][0] == ["samples.jsonl", "60.0% (20.0% to 100.0%)"]
    assert ["paper: 7B", "33.5%"] in scores["rows"]
    (row,) = results["grid"]
    assert [(cell["task"], cell["verdict"]) for cell in row["cells"]] == [
        ("Tiny/0", "passed"),
        ("Tiny/1", "wrong"),
        ("Tiny/2", "passed"),
        ("Tiny/3", "error"),
        ("Tiny/4", "passed"),
    ]
    wrong, error = results["failures"]
    assert (wrong["title"], wrong["verdict"], wrong["printed"]) == ("Tiny/1", "wrong", "<b>seen</b>")
    assert "SyntaxError" in error["detail"]
    assert {"sandbox", "limits", "data", "answers", "packages", "puna"} <= results["run"].keys()

    page = write_evaluation([folders[0]], tmp_path / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "&lt;b&gt;seen&lt;/b&gt;" in page
    assert 'title="Tiny/1: wrong"' in page
    assert not re.search(r"(src|href)=", page)


def test_the_page_names_the_commit_that_ran_here_and_other_versions_of_the_answers(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    run_here = evaluation_results([folders[0]])["run"]
    assert run_here["puna"] == what_runs_here()["puna"]
    assert "puna, of the answers" not in run_here
    copy = shutil.copytree(folders[0], tmp_path / "copy")
    write_json(copy / "result.json", read_json(copy / "result.json") | {"puna": "0.0.1, 0.0.2"})
    both = evaluation_results([copy])["run"]
    assert (both["puna"], both["puna, of the answers"]) == (what_runs_here()["puna"], "0.0.1, 0.0.2")


def test_results_of_one_model_stand_side_by_side(folders: tuple[Path, Path]) -> None:
    results = evaluation_results(folders)
    names = [f"samples.jsonl ({folder})" for folder in folders]
    (scores,) = [table for table in results["tables"] if table["title"] == "Scores"]
    assert [row[0] for row in scores["rows"][:2]] == names
    assert [row["name"] for row in results["grid"]] == names


def test_several_models_stand_in_one_table_and_one_page(
    bubblewrap: str, tmp_path: Path, tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny_tasks(tmp_path / "tasks.jsonl")
    models = [str(tmp_path / "CodeLlama-7b-hf"), str(tmp_path / "ours")]
    for model in models:
        Path(model).symlink_to(tiny_model_folder)
    command = ["evaluate", "humaneval", *models, "--data", str(tmp_path / "tasks.jsonl"), "--max-tokens", "2"]
    assert run([*command, "--device", "cpu", "-o", str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    assert "report: " in captured.err
    header, first, second = captured.out.splitlines()
    assert header.split() == ["pass@1"]
    assert first.split() == [models[0], "0.0000", "(0.335)"]
    assert second.split() == [models[1], "0.0000"]
    page = (tmp_path / "out/report.html").read_text()
    assert all(model in page for model in models)
    assert page.count('class="card grid-row"') == 2
    assert run([*command, "--device", "cpu", "--json"]) == 0
    assert [one["model"] for one in json.loads(capsys.readouterr().out)["results"]] == models


def test_several_models_are_all_looked_at_before_the_first_is_scored(
    tmp_path: Path, tiny_model_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Path("m").symlink_to(tiny_model_folder)
    Path("a.py").write_text("import os\n" * 9)
    command = ["--corpus", "a.py", "--cases", "1", "--max-tokens", "1", "--device", "cpu", "-o", "../out"]

    def refused(models: list[str], message: str) -> None:
        assert run(["evaluate", "completion", *models, *command]) in (1, 2)
        captured = capsys.readouterr()
        assert message in captured.err
        assert "completing" not in captured.err

    for lacking, message in (
        ("tokenizer*", "holds neither tokenizer.model nor"),
        ("*.safetensors", "holds no weights"),
        ("config.json", "has no config.json"),
    ):
        shutil.copytree(tiny_model_folder, "other", dirs_exist_ok=True)
        for file in Path("other").glob(lacking):
            file.unlink()
        refused(["m", "other"], message)
    refused(["m", "nowhere"], "there is no folder nowhere")
    refused(["m", "./m"], "m and ./m would both go to ../out/m; score them one by one")
    shutil.copytree(tiny_model_folder, "..", dirs_exist_ok=True)
    assert run(["evaluate", "completion", "m", "..", *command]) == 0
    assert sorted(path.name for path in Path("../out").iterdir()) == sorted(["m", tmp_path.name, "report.html"])
    capsys.readouterr()
    Path("../out/m").rename(f"../out/{tmp_path.name}-before")
    Path(f"../out/{tmp_path.name}").rename("../out/m")
    refused(["..", "m"], "out/m holds the result of another run: its model is .., this one's m")


def test_scores_by_position_become_a_curve(tmp_path: Path) -> None:
    spans = [{"from": 1, "to": 255, "perplexity": 9.0}, {"from": 256, "to": 511, "perplexity": 7.5}]
    result = {"benchmark": "perplexity", "perplexity": 8.1, "by_position": spans, "model": "ours"}
    (tmp_path / "result.json").write_text(json.dumps(result))
    results = evaluation_results([tmp_path])
    assert results["curves"][0]["lines"][0]["points"] == [[255, 9.0], [511, 7.5]]
    assert results["tables"][0]["rows"] == [["ours", "8.100"]]
    assert "<svg" in write_evaluation([tmp_path], tmp_path / "page.html").read_text()
