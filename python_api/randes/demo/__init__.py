"""The demonstration: fine-tunes of a small transformer on scikit-learn's digits, superposed and served.

digits      the data, sixteen tasks made of it, the model, and its training
baselines   task arithmetic and TIES merging
run         the experiment: train, superpose, evaluate every method
report      its table and its picture
"""
