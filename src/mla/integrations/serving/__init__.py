"""Transformers' own OpenAI server over an absorbed model: what it lacks, and nothing that it has."""
