"""prunelens"""
