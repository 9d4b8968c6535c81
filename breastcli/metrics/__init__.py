"""Figures computed from predictions and saliency maps, each with its interval."""
