"""Attacks on what a run really released, as the server could make them: what ``splitfl audit`` runs.

The attacker knows the public base model, its tokenizer, the mechanism with its parameters, and public text; it holds
every release of a record and uses all of them jointly. From an :class:`~splitfl.lab.audit.observed.Observed` sample it
recovers tokens; :func:`~splitfl.lab.audit.run.run_audit` runs every attack and reports the strongest first. A recovery
is a lower bound: a better attacker may exist, and nothing here is a guarantee.
"""
