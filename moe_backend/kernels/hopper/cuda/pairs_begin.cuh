// pairs_*.cu: how a block begins, once its barriers are ready. Included after the kernel's sizes and items.
#pragma once

#include "hits.cuh"

// Until the other block's barriers are there and what earlier launches wrote can be read. Returns how many experts were
// hit; shared.hits has them.
template <class Shared> DEVICE int begin(Shared& shared, const int* list, int blocks) {
    wait_for_launches();
    let_next_start();  // only now: what follows reads what earlier launches wrote before it waits
    const int count = read_list<THREADS>(list, shared.hits, shared.warp_totals,
                                         [=](int tokens) { return items_of(tokens, blocks); });
    cluster_sync();
    return count;
}
