"""DRAWS stored tables: tables become views (tidy frames), views become pictures.

Never loads torch.
"""
