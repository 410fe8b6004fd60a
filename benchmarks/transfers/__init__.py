"""What :mod:`benchmarks.transfer` does, in parts.

``protocol`` says what decides a result, ``methods`` what is compared and by which commands; ``learners`` and ``train``
are the pre-trainings that are not MCL's, ``cost`` counts what they all cost; ``tasks`` runs commands, ``cells`` makes
results of what they left behind, ``statistics``, ``report`` and ``chart`` compare them.
"""
