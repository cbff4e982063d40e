"""What a run will cost before it is started: tokens, FLOPs, memory per GPU and GPU-hours.

Arithmetic over the configuration. The only thing sampled are masks, drawn by the code that training
uses, because how many tokens they keep depends on the micro-batch.
"""
