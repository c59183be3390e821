"""Statistics of the sources over their data, gathered before a merge that needs them.

data      a source's examples
plan      what has to be gathered, and what the cache has
gram      matrices of what linear layers see, in rounds that fit into memory
fisher    importances: mean squared gradients of the log-likelihood
store     the file that either becomes, in the cache, whole or not at all
run       from a plan that lacks statistics to one that has them
"""
