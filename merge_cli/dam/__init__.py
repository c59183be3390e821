"""DAM: learning the coefficients of a merge by imitating its sources. See docs/dam.md.

    teachers ──▶ cached predictions ──┐
    sources ──▶ student ──▶ loss ──▶ backward: dL/dc = R(G ∘ W), one tensor at a time
                   ▲                                      │
                   └────── coefficients ◀── optimizer ◀───┘ ──▶ coefficients.safetensors

Nothing here writes a model: the engine does, from the coefficients.
"""
