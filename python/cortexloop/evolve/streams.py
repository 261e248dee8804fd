"""Streams of random numbers: what each number is for, so that none is used twice. Noise models use 128 and above."""

from __future__ import annotations

CMA = 0
SPHERE = 1
GENETIC_FIRST = 2
GENETIC_PARENTS = 3
GENETIC_RECOMBINATION = 4
GENETIC_MUTATED = 5
GENETIC_MUTATION = 6
NES = 7
FDGD = 8
