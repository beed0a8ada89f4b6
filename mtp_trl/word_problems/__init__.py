"""The bundled benchmark: word problems, their tokenizer and a small base model trained on them."""

from mtp_trl.word_problems.generator import Problem, final_answer, load_dataset, test_problems, train_problems

__all__ = ["Problem", "final_answer", "load_dataset", "test_problems", "train_problems"]
