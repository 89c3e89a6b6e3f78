"""``import tokenformer.lm_eval`` registers the model ``tokenformer`` with lm-evaluation-harness; run as a module it is
the harness's own command with that model known::

    python -m tokenformer.lm_eval run --model tokenformer --model_args path=DIR --tasks lambada_openai
"""

from tokenformer.evaluation.harness.model import TokenFormerLM

__all__ = ["TokenFormerLM"]

if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
