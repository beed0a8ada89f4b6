"""Write the bundled base model from a run of recipes/tiny_base.yaml: bf16 weights, measured accuracy, provenance.

python benchmarks/publish_base.py runs/tiny_base/checkpoint-1300
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from mtp_trl.modeling.files import write_atomically
from mtp_trl.publishing.provenance import run_facts
from mtp_trl.word_problems import Problem, final_answer, test_problems

RECIPE = Path("recipes/tiny_base.yaml")
BASE = Path("mtp_trl/word_problems/base")
BATCH_SIZE = 100
MAX_NEW_TOKENS = 160


@torch.inference_mode()
def greedy_accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: list[Problem]) -> float:
    """Return the share of problems whose greedy answer ends in the correct number."""
    correct = 0
    problems = sorted(problems, key=lambda problem: len(problem.prompt))
    for start in range(0, len(problems), BATCH_SIZE):
        batch = problems[start : start + BATCH_SIZE]
        inputs = tokenizer([problem.prompt for problem in batch], return_tensors="pt", padding=True)
        output = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        correct += sum(final_answer(text) == problem.result for text, problem in zip(texts, batch, strict=True))
    return correct / len(problems)


def provenance(run: Path, accuracy: float, problems: int) -> dict[str, Any]:
    """Return everything needed to reproduce this checkpoint and its measurement."""
    state = json.loads((run / "trainer_state.json").read_text(encoding="utf-8"))
    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    recipe.pop("launch")
    facts = run_facts()
    return {
        "command": f"accelerate launch {RECIPE}",
        "recipe": recipe,
        "seed": recipe["seed"],
        "steps": state["global_step"],
        "tokens": next(int(log["num_tokens"]) for log in reversed(state["log_history"]) if "num_tokens" in log),
        "date": facts["date"],
        "hardware": facts["hardware"],
        "versions": facts["versions"],
        "evaluation": {
            "command": f"python benchmarks/publish_base.py {run}",
            "problems": problems,
            "decoding": "greedy",
            "accuracy": round(accuracy, 4),
            "standard_error": round(math.sqrt(accuracy * (1 - accuracy) / problems), 4),
        },
    }


def main() -> None:
    """Save the run's weights in bf16, load them again, measure their accuracy, and write the provenance."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="checkpoint folder of a run of the base recipe")
    parser.add_argument("--problems", type=int, default=1000)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    trained = AutoModelForCausalLM.from_pretrained(options.run, dtype=torch.bfloat16)
    trained.config.use_cache = True
    trained.generation_config.eos_token_id = tokenizer.eos_token_id
    trained.generation_config.pad_token_id = tokenizer.pad_token_id
    trained.generation_config.use_cache = True
    trained.save_pretrained(BASE)
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    accuracy = greedy_accuracy(model, tokenizer, test_problems(options.problems))
    facts = provenance(options.run, accuracy, options.problems)
    write_atomically(BASE / "provenance.json", json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts["evaluation"], indent=2))


if __name__ == "__main__":
    main()
