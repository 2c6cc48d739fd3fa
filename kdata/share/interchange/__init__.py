"""Logit datasets of other tools: import them as they are, and export what those tools read.

    rows.py        a row of another tool, before and after alignment, and counts of what is wrong with it
    distillkit.py  DistillKit's compressed Parquet, with the YAML beside it
    axolotl.py     the two column layouts that axolotl's KD plug-in reads
    vllm_json.py   vLLM's own JSON with prompt_logprobs
    plain.py       nested lists of ids and log-probabilities, as JSONL or Parquet
    importer.py    rows of any of these -> a dataset
    exporter.py    a dataset -> nested lists, or axolotl's columns

Nothing is repaired. What a format does not hold is marked absent; what it holds wrongly is counted and reported.
"""
