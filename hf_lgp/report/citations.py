"""What to cite: the paper whose method this package implements, and the package."""

from .._version import __version__

BIBTEX = f"""\
@article{{ciosek2025linear,
  title         = {{Linear Gradient Prediction with Control Variates}},
  author        = {{Ciosek, Kamil and Felicioni, Nicol{{\\`o}} and {{Elenter Litwin}}, Juan}},
  year          = {{2025}},
  journal       = {{arXiv preprint arXiv:2511.05187}},
  eprint        = {{2511.05187}},
  archivePrefix = {{arXiv}},
  url           = {{https://arxiv.org/abs/2511.05187}}
}}

@software{{hf_lgp,
  title   = {{hf\\_lgp: linear gradient prediction with control variates for transformers.Trainer}},
  author  = {{{{The hf\\_lgp contributors}}}},
  version = {{{__version__}}},
  license = {{Apache-2.0}}
}}
"""
