"""`cortexloop evolve`: images evolved for model neurons, compared, reported and stored.

`command` is the whole, `options` settles what was asked for, `run` evolves, `store` keeps the folder, `compare` has the
statistics, `findings` is what they found, and `summary`, `tables` and `report` tell it.
"""
