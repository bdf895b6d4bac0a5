"""Metrics: what a model does, with n and an interval for every figure.

from expunge.metrics.evaluation import EvaluationData, EvaluationPlan, evaluate_model
"""
