"""Ask about single tokens in SQL: what surprises the teacher, and how sure it is.

    python examples/ask_about_tokens.py [DATASET]

Without DATASET it takes the one that capture_your_text.py wrote. More queries are in kdata/store/README.md.
"""

import sys

import kdata

data = kdata.open(sys.argv[1] if len(sys.argv) > 1 else "runs/examples/dataset")

# 1. `tokens` has a row for each token. Log-probabilities are natural logarithms. `domain` is a column of `rows`.
surprises = data.sql("""
    select domain, id, position, token, -logprob as surprise, rank from tokens join rows using (id)
    where target order by surprise desc, id, position limit 5
""")
for row in surprises.to_pylist():
    print(
        f"{row['domain']}, {row['id']} at {row['position']}: {row['token']!r}, {row['surprise']:.1f} nats, rank {row['rank']}"
    )

# 2. `entries` has a row for each token that the teacher thought likely at a position. How often did it come?
calibration = data.sql("""
    select floor(least(e.weight, 0.999) * 5) / 5 as at_least, avg(e.weight) as believed,
        avg((e.token_id = t.token_id)::int) as came, count(*) as entries
    from entries as e join tokens as t using (id, position) where t.target and not e.is_draw group by 1 order by 1
""")
for row in calibration.to_pylist():
    print(f"believed {row['believed']:.0%}, came {row['came']:.0%} of {row['entries']:,} times")

# 3. The same stream in Python, of a few columns and rows. It never holds the whole dataset.
first = range(min(10, len(data)))
unsure = sum(
    value > 3 for batch in data.tokens(["entropy"], rows=first) for value in batch["entropy"].drop_null().tolist()
)
print(f"the teacher has more than 3 nats of entropy at {unsure} tokens of the first {len(first)} sequences")
