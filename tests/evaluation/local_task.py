"""A task of lm-evaluation-harness that needs no download."""

from __future__ import annotations

WORDS = [" self", " None", " return", " import", " for", " in", " if", " not", " def", " True", " class", " else"]


ROWS = [  # choices of one token each, or the shortest would always win
    {"before": f"x{i} ={WORDS[5 * i % 12]}", "choices": [WORDS[(i + j * j) % 12] for j in (1, 2, 3)], "right": i % 3}
    for i in range(30)
]


TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{before}}}}"
doc_to_choice: choices
doc_to_target: right
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: brier_score
    aggregation: brier_score
    higher_is_better: false
metadata:
  version: 2.0
"""
