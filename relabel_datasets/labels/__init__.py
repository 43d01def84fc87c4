"""The idea: label maps, how they are stored, pooled, and carried through transforms."""
