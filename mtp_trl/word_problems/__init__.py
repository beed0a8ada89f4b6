"""The bundled benchmark: word problems, their tokenizer and a small base model trained on them."""

from .generator import TEST_SIZE, Problem, final_answer, load_dataset, test_problems, train_problems

__all__ = ["TEST_SIZE", "Problem", "final_answer", "load_dataset", "test_problems", "train_problems"]
