"""Test that exports and pushes contain a complete repository and nothing else. Pushes use the real client and a local Hub."""

import dataclasses
import json
import logging
import os
import shutil
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import HfApi, parse_eval_result_entries
from peft import LoraConfig
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import mtp_trl
from mtp_trl import MTPDistillConfig, MTPDistillTrainer
from mtp_trl.cli import main
from mtp_trl.modeling.mask_token import set_decoding_defaults
from mtp_trl.publishing.calibration_file import CALIBRATION_FILE, Calibration, Counts, Step
from mtp_trl.publishing.card import MARK
from mtp_trl.publishing.export import export
from mtp_trl.publishing.provenance import run_facts
from mtp_trl.publishing.push import link_or_copy, push
from mtp_trl.publishing.report import from_json, to_json
from mtp_trl.publishing.repository import decoder_files, write_decoder
from mtp_trl.word_problems import load_dataset

HERE = Path(__file__).parent
TOKENIZER = Path(mtp_trl.__file__).parent / "word_problems" / "base"
REPOSITORY = "me/model"
FILES = {
    ".gitattributes",
    "README.md",
    "config.json",
    *(f"custom_generate/{name}" for name in decoder_files()),
    "generation_config.json",
    "model.safetensors",
    "mtp_provenance.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
PRIVATE = (
    "training_args.bin",
    "optimizer.pt",
    "trainer_state.json",
    "rng_state.pth",
    "custom_generate/__pycache__/generate.pyc",
    "checkpoint-1/model.safetensors",
    ".env",
    "notes.txt",
)


# huggingface_hub 2.4 uploads large files with a deprecated option of its HTTP client.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")


@pytest.fixture
def folder(tmp_path, tiny_model):
    """Return the output folder of a run: a model with its decoder, and private files that must not be published."""
    folder = tmp_path / "run" / "out"
    model = tiny_model("llama")
    set_decoding_defaults(model, confadapt=0.9, verify=False)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    facts = {"base_model": "org/base", "mask_token": "<|mtp|>", "objective": "hard", "k_min": 2, "k_max": 8, "settings": {}}
    write_decoder(folder, model, facts | run_facts())
    for name in PRIVATE:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("hf_secret")
    return folder


def names(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# ---- export to a folder ----


def test_an_export_contains_exactly_the_files_of_a_repository(folder, tmp_path, capsys):
    assert main(["export", str(folder), str(tmp_path / "new" / "model"), "--repository", "me/other"]) == 0
    assert names(tmp_path / "new") == {f"model/{name}" for name in FILES - {".gitattributes"}}
    assert "me/other" in (tmp_path / "new" / "model" / "README.md").read_text()
    assert str(tmp_path / "new" / "model") in capsys.readouterr().out


def test_results_are_written_to_the_card_and_to_the_hubs_leaderboards(folder, tmp_path):
    ours, benchmark = tmp_path / "ours" / "results.json", tmp_path / "gsm8k.json"
    ours.parent.mkdir()
    report = from_json((HERE.parent / "docs" / "results" / "tiny_exact.json").read_text())
    ours.write_text(to_json(report))
    ours.with_name("pareto.png").write_bytes(b"a plot")
    facts = report.provenance | {"dataset": {"id": "openai/gsm8k", "task_id": "gsm8k"}}
    benchmark.write_text(to_json(dataclasses.replace(report, provenance=facts)))
    output = export(folder, tmp_path / "model", results=[ours, benchmark])
    card = (output / "README.md").read_text()
    assert "| ConfAdapt 0.9 |" in card
    assert "](mtp_results/ours.png)" in card
    assert (output / "mtp_results" / "ours.png").read_bytes() == b"a plot"
    assert names(output / ".eval_results") == {"gsm8k.yaml"}
    entries = parse_eval_result_entries(yaml.safe_load((output / ".eval_results" / "gsm8k.yaml").read_text()))
    assert len(entries) == len(report.rows) - 1  # the base has no entry: its accuracy is not this model's
    assert {entry.dataset_id for entry in entries} == {"openai/gsm8k"}
    assert entries[1].notes.startswith("static k=2, 1.99 tokens per forward pass")


def test_a_card_that_its_author_has_written_is_not_overwritten(folder, tmp_path):
    card = "---\nlicense: mit\n---\n# Mine\n"
    (folder / "README.md").write_text(card)
    assert (export(folder, tmp_path / "first") / "README.md").read_text() == card
    (folder / "README.md").write_text(f"{MARK}\nold")
    assert "## Limitations" in (export(folder, tmp_path / "second") / "README.md").read_text()


def break_weights(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def break_shards(folder):
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config["mtp"] = changes.get("mtp") and config["mtp"] | changes["mtp"]
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_weights, "lacks model.safetensors"),
        (break_shards, "lacks model-00002-of-00002.safetensors"),
        (lambda folder: (folder / "mtp_provenance.json").unlink(), "no mtp_provenance.json"),
        (lambda folder: shutil.rmtree(folder / "custom_generate"), "no custom_generate/generate.py"),
        (lambda folder: change_config(folder, mtp=None), "no mask token"),
        (lambda folder: change_config(folder, mtp={"exact": True}), "mtp_adapter.safetensors is missing"),
    ],
)
def test_an_incomplete_model_is_refused_and_nothing_is_written(folder, tmp_path, damage, message):
    damage(folder)
    with pytest.raises(ValueError, match=message):
        export(folder, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_errors_of_export_name_a_remedy(folder, tmp_path):
    with pytest.raises(FileExistsError, match="name another folder"):
        export(folder, folder)
    with pytest.raises(ValueError, match="adapter_only requires exact mode, or LoRA"):
        export(folder, tmp_path / "model", adapter_only=True)
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(ValueError, match=r"bad\.json is not a results\.json"):
        export(folder, tmp_path / "model", results=[tmp_path / "bad.json"])


# ---- push to the Hub ----


def test_a_push_makes_one_commit_and_an_unchanged_folder_none(folder, online, capsys):
    assert main(["push", str(folder), REPOSITORY]) == 0
    repository = online.repositories[REPOSITORY]
    assert repository.names() == FILES
    assert len(repository.commits) == 2  # the Hub's initial commit and this push
    assert online.url in capsys.readouterr().out
    push(folder, REPOSITORY)
    assert len(repository.commits) == 2
    assert len(online.uploads) == 1
    assert {path.name for path in folder.parent.iterdir()} == {"out"}  # no snapshot is left


def test_a_push_with_other_results_does_not_change_the_files_in_the_folder(folder, online, tmp_path):
    results = HERE.parent / "docs" / "results" / "tiny_exact.json"
    (folder / "mtp_results").mkdir()
    report, card = folder / "mtp_results" / "tiny_exact.json", folder / "README.md"
    report.write_text(results.read_text().replace("word problems", "our problems"))
    card.write_text(MARK)
    before = [report.read_text(), card.read_text()]
    push(folder, REPOSITORY, results=[results])
    assert [report.read_text(), card.read_text()] == before
    repository = online.repositories[REPOSITORY]
    assert b"our problems" not in repository.commits[repository.head]["README.md"]


def test_a_push_deletes_stale_model_files_and_keeps_the_files_of_the_author(folder, online):
    push(folder, REPOSITORY)
    repository = online.repositories[REPOSITORY]
    stale = ["adapter_config.json", "adapter_model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin"]
    stale += ["mtp_results/sums.json", "mtp_results/sums.png", ".eval_results/sums.yaml"]
    stale += ["vocab.json", "additional_chat_templates/rag.jinja"]
    kept = ["LICENSE", "assets/picture.png", "notes.md", "handler.py", ".eval_results/others.yaml", "vocabulary.md"]
    repository.write(repository.commits[repository.head] | dict.fromkeys([*stale, *kept], b"x"))
    push(folder, REPOSITORY)
    assert repository.names() == FILES | set(kept)


def test_a_push_creates_a_missing_branch(folder, online):
    push(folder, REPOSITORY)
    repository = online.repositories[REPOSITORY]
    before = repository.head
    (folder / "generation_config.json").write_text("{}")
    for _ in range(2):
        assert main(["push", str(folder), REPOSITORY, "--revision", "next"]) == 0
    assert repository.head == before
    assert len(repository.commits) == 3
    _, files = repository.at("next")
    assert files["generation_config.json"] == b"{}"


def test_a_failed_upload_changes_nothing_and_a_second_push_completes_it(folder, online, monkeypatch, tiny_model):
    push(folder, REPOSITORY)
    repository = online.repositories[REPOSITORY]
    before = repository.head
    tiny_model("llama", seed=1).save_pretrained(folder)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # skip the waits between retries
    online.broken_uploads = 100
    with pytest.raises(OSError, match="The repository is unchanged; push again"):
        push(folder, REPOSITORY)
    assert repository.head == before
    assert {path.name for path in folder.parent.iterdir()} == {"out"}
    online.broken_uploads = 1  # the client retries once and succeeds
    push(folder, REPOSITORY)
    assert repository.head != before
    assert repository.names() == FILES
    assert len(online.uploads) == 2


def test_weights_that_were_uploaded_before_the_connection_failed_are_not_uploaded_again(folder, online):
    def cut_off(repository):
        raise ConnectionResetError

    online.before_commit = cut_off
    online.handle_error = lambda *_: None  # do not print the traceback
    with pytest.raises(OSError, match="The push to me/model failed"):
        push(folder, REPOSITORY)
    assert len(online.uploads) == 1
    online.before_commit = None
    push(folder, REPOSITORY)
    assert len(online.uploads) == 1
    assert online.repositories[REPOSITORY].names() == FILES


def test_a_concurrent_push_is_not_overwritten(folder, online, capsys):
    push(folder, REPOSITORY)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    online.before_commit = lambda repository: repository.write({"theirs.txt": b"new"})
    assert main(["push", str(folder), REPOSITORY]) == 2
    assert "changed on the Hub during this push" in capsys.readouterr().err
    assert online.repositories[REPOSITORY].names() == {"theirs.txt"}


def test_a_private_repository_accepts_only_the_right_token(folder, online, monkeypatch, capsys):
    assert main(["push", str(folder), REPOSITORY, "--private"]) == 0
    assert online.repositories[REPOSITORY].private
    monkeypatch.setenv("HF_TOKEN", "hf_wrongtoken")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert main(["push", str(folder), REPOSITORY]) == 2
    error = capsys.readouterr().err
    assert "does not let this token write to me/model" in error
    assert "hf_wrongtoken" not in error
    assert online.repositories[REPOSITORY].names() == FILES


def small_run(folder, *, lora=False, **options):
    """Return a trainer of exact mode, or of LoRA on a base that is saved next to `folder`."""
    config = LlamaConfig(
        vocab_size=768, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, bos_token_id=0,
        eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    args = MTPDistillConfig(
        str(folder), use_cpu=True, bf16=False, report_to="none", k_max=4, slots_per_row=8, max_steps=3, disable_tqdm=True,
        per_device_train_batch_size=2, gradient_checkpointing=False, num_eval_prompts=0, exact=not lora, exact_rank=2,
        **options,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    base = LlamaForCausalLM(config)
    if lora:
        base.save_pretrained(folder.parent / "base")
        base = str(folder.parent / "base")
    adapter = LoraConfig(r=2, target_modules=["q_proj"]) if lora else None
    return MTPDistillTrainer(base, args, load_dataset("train", 4, 0), processing_class=tokenizer, peft_config=adapter)


def test_training_continues_when_the_hub_is_temporarily_unreachable(online, tmp_path, monkeypatch, caplog):
    create, errors = HfApi.create_repo, [ConnectionError("Name or service not known")]

    def create_after_one_failure(*args, **options):
        if errors:
            raise errors.pop()
        return create(*args, **options)

    run = small_run(tmp_path / "out", push_to_hub=True, hub_model_id=REPOSITORY, save_steps=1, hub_always_push=True)
    monkeypatch.setattr(HfApi, "create_repo", create_after_one_failure)
    with caplog.at_level(logging.WARNING, logger="mtp_trl.training.saving"):
        run.train()
    assert run.state.global_step == 3
    assert "A push during training failed" in caplog.text
    run._finish_current_push()
    assert len(online.repositories[REPOSITORY].commits) >= 3  # the Hub's initial commit, and those of steps 2 and 3


def test_measurements_of_earlier_weights_are_not_published(tmp_path, caplog):
    """Saving again without another training step keeps the measurements and the calibrated threshold."""
    out = tmp_path / "out"
    run = small_run(out, save_strategy="no")
    run.save_model()
    steps = [Step(0.7, Counts(100, 0, 0, 2.0), 0.001, True)]
    calibration = Calibration("accuracy", 0.01, 0.95, 0.7, steps, {})
    calibration.write(out / CALIBRATION_FILE)
    (out / "mtp_results").mkdir()
    (out / "mtp_results" / "a.json").write_text("{}")
    run.save_model()
    assert Calibration.read(out / CALIBRATION_FILE) == calibration
    assert json.loads((out / "generation_config.json").read_text())["confadapt"] == 0.7
    run.train()
    with caplog.at_level(logging.WARNING, logger="mtp_trl.training.saving"):
        run.save_model()
    assert "was measured on other weights" in caplog.text
    assert not {CALIBRATION_FILE, "mtp_results"} & {path.name for path in out.iterdir()}
    assert Calibration.read(out / f"earlier_{CALIBRATION_FILE}") == calibration
    assert json.loads((out / "generation_config.json").read_text())["confadapt"] == 0.9
    exported = export(out, tmp_path / "exported")
    assert not [name for name in names(exported) if "earlier" in name]


def test_pushed_models_load_from_the_hub_and_decode_like_the_trained_ones(run_program, hub_server, tmp_path):
    environment = {
        **os.environ, "HF_ENDPOINT": hub_server.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_test",
    }  # fmt: skip
    done = run_program([HERE / "hub_round_trip.py", tmp_path, TOKENIZER], env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "A push during training failed" not in done.stderr
    weights, adapter = {"config.json", "generation_config.json", "model.safetensors"}, "custom_generate/mtp_adapter.safetensors"
    expected = {"full": FILES, "lora": FILES, "exact": FILES | {adapter}, "adapter_only": FILES - weights | {adapter}}
    expected["lora_adapter_only"] = expected["adapter_only"] | {"adapter_config.json", "adapter_model.safetensors"}
    for kind, files in expected.items():
        repository = hub_server.repositories[f"me/{kind}"]
        assert repository.names() == files
        first, *during, last = repository.commits.values()
        assert set(first) == {".gitattributes"}
        assert [set(commit) for commit in during] == [files, files]  # one commit for each checkpoint
        assert b"`word_problems`" in last["README.md"]
    contents = [
        file for repository in hub_server.repositories.values() for file in repository.commits[repository.head].values()
    ]
    for content in [*(file for file in contents if isinstance(file, bytes)), *hub_server.objects.values()]:
        assert b"hf_test" not in content
        assert str(tmp_path).encode() not in content


def test_a_snapshot_in_the_hubs_cache_is_pushed_with_its_content(online, folder, tmp_path, monkeypatch):
    """Files of a snapshot are relative symbolic links. A hard link to one would be broken in another folder."""
    snapshot, blobs = tmp_path / "cache" / "snapshots" / "abc", tmp_path / "cache" / "blobs"
    for name in FILES - {".gitattributes", "README.md"}:
        blob = blobs / name.replace("/", "_")
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / name, blob)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))
    exported = export(snapshot, tmp_path / "elsewhere" / "deeper" / "model", copy=link_or_copy)
    assert (exported / "config.json").read_text() == (folder / "config.json").read_text()
    assert not [path for path in exported.rglob("*") if path.is_symlink()]
    push(snapshot, REPOSITORY)
    assert online.repositories[REPOSITORY].names() == FILES


def with_evidence(out):
    """Write the files that an author, `mtp-trl eval` and `mtp-trl calibrate` add to saved weights, and return their content."""
    (out / "README.md").write_text("# My own words")
    (out / "LICENSE").write_text("mine")
    Calibration("accuracy", 0.01, 0.95, 0.7, [Step(0.7, Counts(100, 0, 0, 2.0), 0.001, True)], {}).write(out / CALIBRATION_FILE)
    (out / "mtp_results").mkdir()
    report = (HERE.parent / "docs" / "results" / "tiny_exact.json").read_text()
    (out / "mtp_results" / "a.json").write_text(report)
    return {"README.md": b"# My own words", "LICENSE": b"mine", CALIBRATION_FILE: None, "mtp_results/a.json": report.encode()}


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.parametrize("by", ["trainer", "command"])
def test_merged_lora_is_pushed_with_the_other_files_of_its_folder(online, tmp_path, by):
    out = tmp_path / "out"
    run = small_run(out, lora=True, save_strategy="no", hub_model_id=REPOSITORY)
    run.save_model()
    evidence = with_evidence(out)
    (out / "merged" / "mtp_results").mkdir(parents=True)
    (out / "merged" / "mtp_results" / "old.json").write_text(evidence["mtp_results/a.json"].decode())  # of earlier weights
    for _ in range(2):  # the second push deletes none of it
        if by == "trainer":
            run.push_to_hub()
        else:
            push(out, REPOSITORY)
        repository = online.repositories[REPOSITORY]
        files = repository.commits[repository.head]
        assert evidence.keys() <= files.keys()
        assert all(content is None or files[name] == content for name, content in evidence.items())
        assert "model.safetensors" in files
        assert "adapter_model.safetensors" not in files
        assert "mtp_results/old.json" not in files
        assert json.loads(files["generation_config.json"])["confadapt"] == 0.7  # the threshold that was calibrated


def test_a_card_that_its_author_wrote_on_the_hub_is_not_overwritten(online, folder, caplog):
    push(folder, REPOSITORY)
    repository = online.repositories[REPOSITORY]
    assert MARK.encode() in repository.commits[repository.head]["README.md"]
    repository.write(repository.commits[repository.head] | {"README.md": b"# My own words"})
    (folder / "tokenizer_config.json").write_text("{}")
    with caplog.at_level(logging.WARNING, logger="mtp_trl.publishing.push"):
        push(folder, REPOSITORY)
    files = repository.commits[repository.head]
    assert files["README.md"] == b"# My own words"
    assert files["tokenizer_config.json"] == b"{}"
    assert "keeps its README.md" in caplog.text


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_training_continues_when_merging_runs_out_of_memory(online, tmp_path, monkeypatch, caplog):
    def merge(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("mtp_trl.training.saving.save_merged", merge)
    run = small_run(tmp_path / "out", lora=True, push_to_hub=True, hub_model_id=REPOSITORY, save_steps=1)
    with caplog.at_level(logging.WARNING, logger="mtp_trl.training.saving"):
        run.train()
    assert run.state.global_step == 3
    assert "A push during training failed" in caplog.text
    assert "OutOfMemoryError: CUDA out of memory" in caplog.text


def test_a_checkpoint_that_rotation_deletes_is_uploaded_completely(online, tmp_path, monkeypatch):
    """The upload waits in a queue while training continues and keeps only one checkpoint."""
    queued = []
    monkeypatch.setattr("mtp_trl.publishing.push.in_background", lambda send: queued.append(send) or Future())
    out = tmp_path / "out"
    run = small_run(
        out, push_to_hub=True, hub_model_id=REPOSITORY, save_steps=1, save_total_limit=1, hub_strategy="checkpoint",
        hub_always_push=True,
    )  # fmt: skip
    monkeypatch.setattr(run, "_finish_current_push", lambda: None)
    run.train()
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-3"]
    for send in queued:
        send()
    repository = online.repositories[REPOSITORY]
    states = [json.loads(commit["last-checkpoint/trainer_state.json"])["global_step"] for commit in repository.commits.values()
              if "last-checkpoint/trainer_state.json" in commit]  # fmt: skip
    assert sorted(set(states)) == [1, 2, 3]
    assert "last-checkpoint/optimizer.pt" in repository.names()
    assert not list(out.glob(".push-*"))
