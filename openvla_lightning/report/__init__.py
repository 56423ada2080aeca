"""Results of evaluations and sweeps, and what is made of them: tables, pictures, comparisons."""
