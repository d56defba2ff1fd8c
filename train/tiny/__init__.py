"""A reasoning model of 0.8M parameters that this repository trains from scratch, and the problems it solves.

It exists so that test-time scaling can be seen on a laptop: the longer it is made to think, the more it gets right.
"""

from pathlib import Path

from s1engine.train.tiny.task import Problem, grade, problems

MODEL_DIR = Path(__file__).parent / "model"
"""The shipped model: a Hugging Face folder, loadable by this engine and by `transformers`."""

__all__ = ["MODEL_DIR", "Problem", "grade", "problems"]
