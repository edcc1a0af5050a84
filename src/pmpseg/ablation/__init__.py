"""Ablations: a base and named differences, run over seeds, scored alike and written as one table.

``spec`` reads a file of conf/ablation, ``runs`` starts what is not done, ``job`` is one run in a process of its own, ``scoring``
and ``timing`` measure, ``table`` and ``chart`` show. ``python -m pmpseg.ablate`` is the command.
"""
