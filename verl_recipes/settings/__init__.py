"""What a configuration means: the resolvers, arithmetic between groups, and which choices go together.

Imports data_prep alone.
"""
