import os, time
import numpy as np, xxhash
from nodecache.arena import *
from nodecache.pool import *
from nodecache.worth import *
from nodecache.cache import *
from nodecache.loopback import LoopbackStore
from messages.handoff import *
def test_smoke():
    lay=ArenaLayout(fingerprint=b"f",version=1,block_bytes=64,num_blocks=16)
    mem=lay.allocate()
    pool=HostPool(Arena(mem,lay),Worth(16),0.0,1.0)
    print(pool.num_bookkeeping_bytes/16)
    store=LoopbackStore(1000,xxhash.xxh3_64_intdigest)
    c=NodeCache(pool,{"disk":store},CacheLimits(lease_s=5))
    def do(ev,now):
        out=[]
        q=[ev]
        while q:
            for i in c.on_event(q.pop(0),now):
                match i:
                    case ReadBlocks():
                        r=store.read(i.names,[pool.arena.block(b) for b in i.block_ids],1)
                        q.append(BlocksRead(i.read_id,tuple(r)))
                    case WriteBlocks():
                        r=store.write(i.blocks,[pool.arena.block(b) for b in i.block_ids],1)
                        q.append(BlocksKept(i.write_id,tuple(r)))
                    case Tell():
                        out.append(i.message)
            c.check_invariants()
        return out
    names=[os.urandom(16) for _ in range(40)]
    for k in range(0,40,4):
        g,=do(Said(b"w",RoomRequest(request_id=f"{k}",names=b"".join(names[k:k+4]),indexes=list(range(k,k+4)))),k)
        locs=[]
        for l in g.blocks:
            pool.arena.block(l.block_id)[:]=l.name*4
            locs.append(BlockLocation(l.index,l.block_id,l.generation,l.name,16,xxhash.xxh3_64_intdigest(l.name*4)))
        do(Said(b"w",BlocksWritten(request_id=f"{k}",blocks=locs)),k)
        print(k,len(locs),c.take_events().__len__())
    print(pool.num_free, len(list(store.names())))
    out=do(Said(b"a",BlocksRequest(request_id="q",first_index=0,names=b"".join(names[0:8]))),50)
    print([ (o.tier,len(o.blocks),o.is_last) for o in out])
    do(Said(b"a",ReleaseLease(request_id="q")),51)
    assert pool.num_used==0
