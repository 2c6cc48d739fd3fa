"""Logit datasets of other tools: import them as they are, and export what those tools read.

    source.py      files here, on the Hub or at a URL, read where they are
    rows.py        a row of another tool, before and after alignment, and counts of what is wrong with it
    distillkit.py  DistillKit's compressed Parquet, and the older layout, with the settings that are found beside it
    axolotl.py     the two column layouts that axolotl's KD plug-in reads
    vllm_json.py   vLLM's own JSON with prompt_logprobs
    nemo.py        NeMo-Aligner's JSON lines with top-k logits and their log-sum-exp
    megatron.py    Megatron-LM's tar cache, read and written
    plain.py       nested lists of ids and log-probabilities, as JSONL or Parquet, also under other names
    speculators.py hidden states in the folder that `speculators` trains draft models from
    importer.py    rows of any of these -> a dataset
    exporter.py    a dataset -> nested lists, or axolotl's columns

Nothing is repaired. What a format does not hold is marked absent; what it holds wrongly is counted and reported.
"""
