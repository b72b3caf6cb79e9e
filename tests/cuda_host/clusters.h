// Clusters: blocks that start together, meet, and reach each other's barriers and shared memory.
#pragma once

#include "memory.h"

inline int cluster_rank() { return host::machine->current->block->rank; }

// What the thread has sent to barriers of the cluster is there before others go on.
inline void cluster_sync() {
    host::Fiber& self = *host::machine->current;
    if (self.arrivals_there > host::machine->now) {
        host::later(self.arrivals_there, host::started("cluster_sync"), [&self] { host::wake(self); });
        host::wait_for([](const void*, long) { return std::string("its arrivals at other blocks"); }, nullptr);
    }
    host::Cluster& cluster = *self.block->cluster;
    host::meet(cluster.meetings, host::CLUSTER_SYNC, 0, cluster.live, nullptr, host::no_act);
}

// It comes late, as copies do.
inline void barrier_arrive_at(u64* word, int rank) {
    const char* what = "barrier_arrive_at";
    host::maybe_yield();
    host::Fiber& self = *host::machine->current;
    host::Block& block = host::block_of_cluster(rank, what);
    host::Barrier& barrier = host::ready_barrier(host::in_block(word, block), what, block);
    u64 due = host::machine->now + host::some_time();
    self.arrivals_there = std::max(self.arrivals_there, due);
    host::later(due, host::started(what), [&block, &barrier] {
        host::check_live(block);
        host::arrive(barrier);
    });
    host::maybe_yield();
}

namespace host {

inline void copy_to_all(void* to, const TensorMap* map, std::vector<int> from, u64* barrier, int blocks) {
    if (blocks < 1 || blocks >> machine->cluster)
        fail(text("copy_box_to_all to blocks %x of a cluster of %d", blocks, machine->cluster));
    start_boxes(to, map, from, barrier, blocks, "copy_box_to_all");
    maybe_yield();
}

}  // namespace host

inline void copy_box_to_all(void* to, const TensorMap* map, int x, int y, u64* barrier, int blocks) {
    host::copy_to_all(to, map, {x, y}, barrier, blocks);
}
template <bool EVICT_FIRST = false>
inline void copy_box_to_all(void* to, const TensorMap* map, int x, int y, int z, u64* barrier, int blocks) {
    host::copy_to_all(to, map, {x, y, z}, barrier, blocks);
}
