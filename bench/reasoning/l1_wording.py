"""L1's words, of training and evaluation alike; the released models follow no others (cmu-l3/l1, issue 14).

They are those of `scripts/data/deepscaler_dataset.py` there.
"""

INSTRUCTION = r"Let's think step by step and output the final answer within \boxed{}."
EXACT = " Think for {target} tokens."
MAX = " Think for maximum {target} tokens."
