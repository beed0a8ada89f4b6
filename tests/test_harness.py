"""lm-evaluation-harness on a local task: counts equal those of `generate`, and the harness's own `hf` model works too."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from mtp_trl.cli import main
from mtp_trl.evaluation.harness import HarnessModel, OwnStop, Part, run_settings, run_task, table
from mtp_trl.evaluation.loading import load_base, load_student
from mtp_trl.publishing.report import Setting, from_json
from mtp_trl.word_problems import test_problems

ROOT = Path(__file__).resolve().parents[1]
# lm_eval 0.4.13 uses deprecated functions and leaves files open
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning")
QUESTIONS = ["3 + 4 =", "Tom has 3 pens and buys 4. How many?", "How many pens?"]
TASK = """
task: local_sums
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: ["Q:"]
  max_gen_toks: 8
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory, write_student):
    """A random base, a student with the same weights, and a task whose answer key has the base's answers except the last."""
    root = tmp_path_factory.mktemp("harness")
    write_student(root / "student", base=root / "base", confadapt=0.9, verify=False, positions=128)
    (root / "tasks").mkdir()
    rows = [{"question": question, "answer": base_answer(root, question)} for question in QUESTIONS]
    rows[2]["answer"] = "never"
    (root / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "tasks" / "local_sums.yaml").write_text(TASK.format(data=root / "test.jsonl"))
    return root


def base_answer(root, question):
    """Return the base's answer, decoded by transformers."""
    model, tokenizer = load_base(root / "base"), AutoTokenizer.from_pretrained(root / "student")
    barred = load_student(root / "student")[0].config.mtp["barred_token_ids"]
    ids = tokenizer(question, return_tensors="pt")["input_ids"]
    answer = model.generate(ids, max_new_tokens=8, do_sample=False, suppress_tokens=barred)
    return tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True).split("Q:")[0]


@pytest.fixture(scope="module")
def model(root):
    student, tokenizer = load_student(root / "student")
    return HarnessModel(student, tokenizer, base=load_base(root / "base"), batch_size=1)


def test_scores_and_counts_are_those_of_the_decoding(root, model):
    settings = [Setting("base"), Setting("plain"), Setting("static", k=2), Setting("verified", threshold=0.0)]
    parts = run_settings(model, "local_sums", settings, tasks_folder=root / "tasks")
    assert parts[Setting("base")].scores == parts[Setting("plain")].scores == [1.0, 1.0, 0.0]
    assert parts[Setting("verified", threshold=0.0)].answers == parts[Setting("plain")].answers
    rows = {row.setting.kind: row for row in table(parts)}
    assert rows["base"].tokens_per_pass == rows["plain"].tokens_per_pass == 1.0
    assert rows["static"].tokens_per_pass == pytest.approx(2.0, abs=0.35)
    assert rows["verified"].same_as_base == 1.0
    assert rows["verified"].versus_base.value == 0.0
    assert rows["plain"].accuracy.value == pytest.approx(2 / 3)
    student, tokenizer = load_student(root / "student")
    passes = 0
    for question in QUESTIONS:
        ids = tokenizer(question, return_tensors="pt")["input_ids"]
        output = student.generate(ids, mtp_k=2, confadapt=0.0, max_new_tokens=8, return_dict_in_generate=True)
        passes += int(output.forward_passes.sum())
    assert parts[Setting("static", k=2)].passes == passes


def test_answers_and_counts_end_at_each_rows_own_stop_in_any_batch(tmp_path):
    """The harness continues rows until their whole batch has stopped. Text after a row's own stop must not count."""
    prompts = [problem.prompt for problem in test_problems(12)]
    data = tmp_path / "test.jsonl"
    data.write_text("".join(json.dumps({"question": prompt, "answer": "x"}) + "\n" for prompt in prompts))
    task = TASK.format(data=data).replace("Q:", ".").replace("max_gen_toks: 8", "max_gen_toks: 32")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local_sums.yaml").write_text(task)
    student, tokenizer = load_student(ROOT / "models" / "tiny_exact_long")
    base = load_base(ROOT / "mtp_trl" / "word_problems" / "base")
    answers, tokens = [], 0
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        generated = student.generate(ids, mtp_k=1, verify=False, max_new_tokens=32)[0, ids.shape[1] :]
        texts = [tokenizer.decode(generated[:n], skip_special_tokens=True) for n in range(1, len(generated) + 1)]
        answers.append(texts[-1].split(".")[0])
        tokens += next((n for n, text in enumerate(texts, start=1) if "." in text), len(texts))
    exact = [Setting("base"), Setting("plain"), Setting("verified", threshold=0.5), Setting("tree", k=8, threshold=0.3)]
    others = [Setting("static", k=4), Setting("confadapt", threshold=0.9)]
    single, batched = (
        run_settings(
            HarnessModel(student, tokenizer, base=base, batch_size=size),
            "local_sums",
            exact + others,
            tasks_folder=tmp_path / "tasks",
        )
        for size in (1, 12)
    )
    for setting in exact + others:
        one, other = single[setting], batched[setting]
        assert (one.answers, one.tokens, one.passes) == (other.answers, other.tokens, other.passes), setting
    for setting in exact:
        assert (batched[setting].answers, batched[setting].tokens) == (answers, tokens), setting


def test_a_stop_string_is_matched_only_in_generated_text(root):
    tokenizer = AutoTokenizer.from_pretrained(root / "student")
    prompt = tokenizer.encode("How many?\n")
    rows = [tokenizer.encode(text, add_special_tokens=False) for text in ("\n3", "3\n")]
    stop = OwnStop(tokenizer, ["\n\n", ""], prompt_length=len(prompt))
    assert stop(torch.tensor([prompt + row for row in rows]), None).tolist() == [False, False]
    stop = OwnStop(tokenizer, ["\n"], prompt_length=len(prompt))
    assert stop(torch.tensor([prompt + row for row in rows]), None).tolist() == [True, True]
    assert [stop.length(row) for row in rows] == [1, len(rows[1])]


def test_an_interrupted_run_resumes_and_other_options_are_refused(root, model, tmp_path, monkeypatch):
    settings = [Setting("plain"), Setting("static", k=2)]
    decoded = []

    def counted(harness, task, setting, **options):
        decoded.append(setting.label)
        if len(decoded) == 2:
            raise KeyboardInterrupt
        return Part([1.0], ["x"], 4, 2, 1.0, None)

    monkeypatch.setattr("mtp_trl.evaluation.harness.run_task", counted)
    with pytest.raises(KeyboardInterrupt):
        run_settings(model, "local_sums", settings, parts=tmp_path, limit=2)
    assert len(run_settings(model, "local_sums", settings, parts=tmp_path, limit=2)) == 2
    assert decoded == ["student, k=1", "static k=2", "static k=2"]
    with pytest.raises(ValueError, match="use another output folder"):
        run_settings(model, "local_sums", settings, parts=tmp_path, limit=3)


def test_files_among_the_options_are_compared_by_content(model, tmp_path, monkeypatch):
    monkeypatch.setattr("mtp_trl.evaluation.harness.run_task", lambda *args, **options: Part([1.0], ["x"], 4, 2, 1.0, None))
    monkeypatch.chdir(tmp_path)
    data, tasks = tmp_path / "data.jsonl", tmp_path / "tasks"
    (tasks / "inner").mkdir(parents=True)
    files = [data, tasks / "one.yaml", tasks / "_default_yaml", tasks / "inner" / "score.py"]
    for file in files:
        file.write_text("before")

    def run(data, tasks):
        run_settings(model, "local_sums", [Setting("plain")], parts=tmp_path / "parts", data=data, tasks_folder=tasks)

    run(data, tasks)
    run(Path("data.jsonl"), Path("tasks") / ".." / "tasks")
    for file in files:
        file.write_text("after")
        with pytest.raises(ValueError, match="use another output folder"):
            run(data, tasks)
        file.write_text("before")
    run(data, tasks)


def test_each_batch_size_has_its_own_parts(root, tmp_path):
    options = ["--tasks", "local_sums", "--include-path", str(root / "tasks"), "--limit", "1", "--output", str(tmp_path)]
    for size in ("1", "2"):
        assert main(["eval", str(root / "student"), *options, "--batch-size", size]) == 0
    assert len(list((tmp_path / "parts").iterdir())) == 2


def test_an_unknown_task_is_refused(root, model):
    with pytest.raises(ValueError, match="does not know the task 'nonsense'"):
        run_task(model, "nonsense", Setting("plain"), tasks_folder=root / "tasks")


def test_the_command_writes_a_report_and_accepts_a_file_as_the_test_set(root, tmp_path, capsys):
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"question": QUESTIONS[0], "answer": "never"}) + "\n")
    options = ["--tasks", "local_sums", "--include-path", str(root / "tasks"), "--task-data", f"local_sums={other}"]
    options += ["--thresholds", "0.5", "--verify", "--blocks", "2", "--output", str(tmp_path / "out")]
    assert main(["eval", str(root / "student"), *options]) == 0
    report = from_json((tmp_path / "out" / "local_sums" / "results.json").read_text())
    assert [row.setting.label for row in report.rows] == ["student, k=1", "ConfAdapt 0.5", "verified 0.5", "2 blocks 0.5"]
    assert report.rows[0].problems == 1
    assert report.rows[0].accuracy.value == 0.0
    assert "dataset" not in report.provenance  # a local file is not a dataset of the Hub
    assert "prompts and stop strings" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("base", "option", "used"),
    [
        ("Magpie-Align/Llama-3.1-8B-Magpie-Align-SFT-v0.1", [], True),
        ("Magpie-Align/Llama-3.1-8B-Magpie-Align-SFT-v0.1", ["--no-chat-template"], False),
        ("Qwen/Qwen3-4B-Instruct-2507", [], False),
        ("org/other", ["--chat-template"], True),
    ],
)
def test_the_chat_template_is_used_as_in_the_paper_unless_an_option_overrides_it(
    root, tmp_path, write_student, monkeypatch, base, option, used
):
    template = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    folder = write_student(
        tmp_path / "student",
        confadapt=0.9,
        verify=False,
        positions=128,
        chat_template=template,
        provenance={"base_model": base},
    )
    tokenizer, read = AutoTokenizer.from_pretrained(folder), []
    generate = HarnessModel._model_generate
    monkeypatch.setattr(
        HarnessModel, "_model_generate", lambda *a, **options: read.append(options["context"]) or generate(*a, **options)
    )
    options = ["--tasks", "local_sums", "--include-path", str(root / "tasks"), "--limit", "1", *option]
    assert main(["eval", str(folder), *options, "--output", str(tmp_path / "out")]) == 0
    texts = [tokenizer.decode(context[0], skip_special_tokens=True) for context in read]
    assert {text.startswith("<user>") for text in texts} == {used}
    report = from_json((tmp_path / "out" / "local_sums" / "results.json").read_text())
    assert report.provenance["chat_template"] == used
    assert ("through the chat template" in report.caption) == used


def test_a_missing_chat_template_is_refused(root, capsys):
    options = ["--tasks", "local_sums", "--include-path", str(root / "tasks"), "--chat-template"]
    assert main(["eval", str(root / "student"), *options]) == 2
    assert "has no chat template; evaluate with --no-chat-template" in capsys.readouterr().err


def test_the_harness_own_command_decodes_in_blocks(root, tmp_path, run_program):
    """Run the `lm_eval` command in a subprocess. With whole blocks, its answers equal those of `generate`."""
    done = run_program([
        "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={root / 'student'},trust_remote_code=True,dtype=float32",
        "--tasks", "local_sums", "--include_path", root / "tasks", "--gen_kwargs", "confadapt=0.0", "--device", "cpu",
        "--log_samples", "--output_path", tmp_path,
    ])  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = tmp_path.rglob("samples_local_sums_*.jsonl")
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    student, tokenizer = load_student(root / "student")
    for question in QUESTIONS:
        ids = tokenizer(question, return_tensors="pt")["input_ids"]
        tokens = student.generate(ids, max_new_tokens=8, confadapt=0.0)[0, ids.shape[1] :]
        answers = [sample["resps"][0][0] for sample in samples if sample["doc"]["question"] == question]
        assert answers == [tokenizer.decode(tokens, skip_special_tokens=True).split("Q:")[0]]


def test_the_harness_own_model_decodes_in_blocks(root, monkeypatch):
    """`lm_eval --model hf --model_args pretrained=FOLDER,trust_remote_code=True --gen_kwargs confadapt=0.9`."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    given = []
    generate = HFLM._model_generate
    monkeypatch.setattr(HFLM, "_model_generate", lambda *a, **options: given.append(options) or generate(*a, **options))
    results = simple_evaluate(
        "hf",
        model_args=f"pretrained={root / 'student'},trust_remote_code=True,dtype=float32",
        tasks=["local_sums"],
        task_manager=TaskManager(include_path=str(root / "tasks"), include_defaults=False),
        gen_kwargs="confadapt=0.9,verify=True",
        device="cpu",
        bootstrap_iters=0,
    )
    assert results["results"]["local_sums"]["exact_match,none"] == pytest.approx(2 / 3)
    assert {options["confadapt"] for options in given} == {0.9}
