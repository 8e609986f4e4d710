"""What the hosts of a plan hold, in words."""

from planner.predict.host_memory import allowed, host_memory, named
from planner.spec.plan import Plan
from planner.spec.wording import gigabytes


def host_sentences(plan: Plan, share: float) -> list[str]:
    """What takes how much of each host's memory, for hosts of which more than a share is taken."""
    sentences = []
    for node, parts in host_memory(plan).items():
        needed, there = sum(parts.values()), allowed(plan.cluster.nodes[node])
        if needed > share * there:
            sentences.append(
                f"The host of node {node} holds {gigabytes(needed)} of {gigabytes(there)} that may "
                f"be used: {named(parts)}."
            )
    return sentences
