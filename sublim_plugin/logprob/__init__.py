"""The log-prob measure on core and torch alone: surface forms, questions, a token tree."""
