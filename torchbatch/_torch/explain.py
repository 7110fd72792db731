"""stub"""
def explain(error, shared): return None
def uncompiled(fun): return fun
