"""testbed: what does this fabric do to my all-reduce?"""
