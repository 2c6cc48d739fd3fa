"""Query a dataset in SQL, bring numbers of your own, and choose what to train on.

    python examples/query_and_choose.py [DATASET]

Without DATASET it takes the one that capture_your_text.py wrote. What is chosen is a plan: a small file of ids beside
the dataset. The data itself is never copied or changed.
"""

import sys

import kdata
from kdata.selection.query import Sql
from kdata.selection.ranked import Random

data = kdata.open(sys.argv[1] if len(sys.argv) > 1 else "runs/examples/dataset")

# 1. Ask. `rows` is a view with one row per sequence; the answer is an Arrow table. NLL is in nats per token.
summary = data.sql("""
    select domain, count(*) as sequences, sum(num_tokens)::bigint as tokens, avg(nll) as nll, avg(kept_mass) as kept_mass
    from rows group by domain order by domain
""")
for row in summary.to_pylist():
    print(row)

# 2. Choose by a query: the sequences that surprise the teacher most, in their order, up to 5,000 tokens of each domain.
HARDEST = """
    select id from (
        select id, nll, sum(num_tokens) over (partition by domain order by nll desc, id) as tokens_so_far from rows
    ) where tokens_so_far <= 5000 order by nll desc, id
"""
hard = kdata.select(data, Sql(name="hard", sql=HARDEST))

# 3. Choose by a method: half of the sequences at random, as the baseline. Every method is in kdata/README.md.
baseline = kdata.select(data, Random(name="half", share=0.5))

# 4. A plan records what it took from each domain, and the query or method that chose it.
for plan in (hard, baseline):
    print(f"plan {plan.info.name}: {plan.info.num_rows} sequences, {plan.info.num_tokens:,} tokens; share of tokens:")
    for domain, shares in plan.info.shares.items():
        print(f"  {domain}: {shares['dataset']:.0%} of the dataset, {shares['plan']:.0%} of the plan")

# 5. Plans are views too: what do the two have in common?
both = data.sql("select count(*) as n from plans.hard join plans.half using (id)").to_pylist()[0]["n"]
print(f"{both} sequences are in both plans")
