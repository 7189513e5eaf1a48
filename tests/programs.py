"""How large a traced program is."""

import jax
import jax.monitoring


def equations(jaxpr):
    inner = [
        part
        for equation in jaxpr.eqns
        for part in jax.tree.leaves(list(equation.params.values()))
        if hasattr(part, "eqns")
    ]
    return len(jaxpr.eqns) + sum(map(equations, inner))
