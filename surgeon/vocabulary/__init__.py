"""Smaller vocabularies: which tokens stay, and everything that names tokens by number rewritten."""
