"""Embedded worlds: small procedural image distributions with captions and checkable rewards.

`shapes` draws captioned scenes of coloured shapes; `verifier` reads such scenes back from pixels and
scores them against captions by GenEval's rules.
"""
