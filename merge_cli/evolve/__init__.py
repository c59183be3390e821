"""Searching a merge's parameters, or its members, by what the merged model is worth.

    recipe ──▶ space: what each number of a genome sets ──▶ optimizer: ask ──▶ genomes
                                                              ▲                  │
    journal ◀── scores ◀── tasks ◀── one live model ◀── static recipe ◀──────────┘
       │
       └──▶ best_recipe.yaml: a static recipe, which the engine merges

A candidate is a static recipe, and the live model becomes its merge through the engine's own code:
nothing here computes a weight, and nothing writes a model. See docs/evolve.md.
"""
