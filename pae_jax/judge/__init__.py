"""`pae judge`: anomaly maps of another tool, measured as our own are.

`judging` is the verb, `maps` finds and reads the files, `protocols` computes what other papers
report for the same maps.
"""

from pae_jax.judge.judging import Judgement, judge

__all__ = ["Judgement", "judge"]
